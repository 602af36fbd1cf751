"""Which images are of which class: from labels that came with them, else from one level of class folders, else none."""

from collections.abc import Iterable

from selfsight.corpus.sources import Source, shown

LabelKey = tuple[int, bytes, str | None]  # (source, folder, label text that came with the image)
MAX_INTEGER_LABEL = 1_000_000


def resolve(found: Iterable[LabelKey], sources: list[Source]) -> tuple[list[str] | None, dict[LabelKey, int], str]:
    """(class names or None, label of each key, a sentence on how it was decided).

    Integer labels are kept as they are. Folder names are classes where every image of a source lies in exactly one
    level of class folders (under whatever folders all of them share) and there are at least two classes.
    """
    keys = sorted(found, key=lambda k: (k[0], k[1], k[2] or ""))
    names: dict[LabelKey, str] = {}
    for number, source in enumerate(sources):
        own = [k for k in keys if k[0] == number]
        if any(k[2] is not None for k in own):
            if not all(k[2] is not None for k in own):
                return None, {}, f"unlabelled: some images of {source.name} have a label and some have none"
            names.update({k: str(k[2]) for k in own})
        else:
            by_folder, why = _folder_classes(own)
            if own and not by_folder:
                return None, {}, f"unlabelled: {why} in {source.name}"
            names.update(by_folder)

    explicit = all(k[2] is not None for k in keys)
    if explicit and all(_is_label(n) for n in names.values()):
        labels = {k: int(n) for k, n in names.items()}
        known = {tuple(s.class_names or ()) for i, s in enumerate(sources) if any(k[0] == i for k in keys)}
        given = list(known.pop()) if len(known) == 1 else []
        top = max(labels.values(), default=-1)
        return (given if len(given) > top else [str(i) for i in range(top + 1)]), labels, "labels came with the images"
    for key, name in names.items():
        given = sources[key[0]].class_names
        if given and key[2] is not None and _is_label(name) and int(name) < len(given):
            names[key] = given[int(name)]
    classes = sorted(set(names.values()))
    if not explicit and len(classes) < 2:
        return None, {}, "unlabelled: there is only one class folder"
    number_of = {name: i for i, name in enumerate(classes)}
    how = "labels came with the images" if explicit else "sub-folder names are the classes"
    return classes, {k: number_of[n] for k, n in names.items()}, how


def _folder_classes(keys: list[LabelKey]) -> tuple[dict[LabelKey, str], str]:
    parts = {k: k[1].split(b"/") if k[1] else [] for k in keys}
    depths = {len(p) for p in parts.values()}
    if depths == {0}:
        return {}, "no class folders"
    if len(depths) > 1 or len({tuple(p[:-1]) for p in parts.values()}) > 1:
        return {}, "images do not all lie in one level of class folders"
    return {k: shown(p[-1]) for k, p in parts.items()}, ""


def _is_label(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < MAX_INTEGER_LABEL
