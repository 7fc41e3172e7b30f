"""Students that the package ships, named SET/NAME as in `digits/dmd`: for trying sampling without training anything."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

MADE = "made.json"  # how a student was made, beside its model


def shipped() -> dict[str, Path]:
    """name -> model folder."""
    assets = Path(str(resources.files("distill.assets")))
    return {
        f"{file.parents[1].name}/{file.parent.name}": file.parent
        for file in sorted(assets.glob(f"*/*/{MADE}"))
    }


def model_folder(path: str | Path) -> Path:
    """The folder of a model: as it is given, or of a shipped student where there is no such folder.

    Raises FileNotFoundError, with the names, for one that starts as those of shipped students do."""
    folder, known = Path(path).expanduser(), shipped()
    if folder.exists():
        return folder
    name = folder.as_posix()
    if name not in known and name.partition("/")[0] in {each.partition("/")[0] for each in known}:
        raise FileNotFoundError(
            f"{name}: no such folder, and no student of the package; expected one of {', '.join(known)}"
        )
    return known.get(name, folder)
