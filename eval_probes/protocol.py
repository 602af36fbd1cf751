"""A protocol is a frozen dataclass: every number that decides a score. Its digest goes with the score."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Protocol:
    """Base of all protocols. `version` rises when the code computes something else from the same numbers."""

    name: ClassVar[str]
    version: ClassVar[int] = 1

    @property
    def digest(self) -> str:
        """sha256 of name, version and every field."""
        said = {"name": self.name, "version": self.version, **asdict(self)}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
