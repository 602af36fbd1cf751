"""The model card of an export: Markdown with the front matter that model hubs read."""

from typing import Any


def model_card(config: dict[str, Any], origin: dict[str, Any]) -> str:
    """The text of README.md for `config` (config.json) and `origin` (selfsight.json). The licence is left open."""
    meta, weights, prep = origin["meta"], origin["weights"], origin["preprocess"]
    size = prep["input_size"][1]
    rows = {
        "architecture": f"`{config['architecture']}` with {config['model_args']}",
        "features": config["num_features"],
        "parameters": f"{weights['parameters']:,}",
        "image size": f"{size} × {size} pixels",
        "objective": meta.get("objective"),
        "encoder of the run": meta.get("which"),
        "step": meta.get("step"),
        "corpus": meta.get("corpus_id"),
        "recipe digest": meta.get("recipe_digest"),
        "sha256 of the weights": weights["sha256"],
        "selfsight": meta.get("selfsight"),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
license:
tags:
- self-supervised
- selfsight
---

# {config["architecture"]}, self-supervised

| | |
|---|---|
{table}

## Loading

```python
import selfsight
encoder = selfsight.load_pretrained("path/to/this/folder")
tokens = encoder(encoder.preprocess(image).unsqueeze(0))  # .cls, .patches, .registers, .avg
```

The folder is in timm's layout as well:

```python
model = timm.create_model("local-dir:path/to/this/folder", pretrained=True)
```

## Preprocessing

`encoder.preprocess` scales the shorter side to {int(size / prep["crop_pct"])} pixels ({prep["interpolation"]}), crops
{size} × {size} at the centre, divides by 255, subtracts {prep["mean"]} and divides by {prep["std"]}.

## Licence

Not stated. The owner of the weights fills in `license:` above.
"""
