"""CI: the wheel and the sdist in a folder hold what they should and no path of the machine that built them."""

import sys
import tarfile
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def check_wheel(path: Path) -> list[str]:
    faults = []
    if "-cp310-abi3-" not in path.name:
        faults.append("the tag must be cp310-abi3")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        libraries = [n for n in names if n.endswith(".so")]
        # What strings(1) would show; the folders where this ran, and where torch's headers were.
        secrets = [str(ROOT.resolve()), str(Path(torch.__file__).parent)]
        for library in libraries:
            content = wheel.read(library)
            faults += [f"{library} contains {secret}" for secret in secrets if secret.encode() in content]
    expected = {"weightxform/_C.abi3.so", "weightxform/py.typed"}
    faults += [f"{name} is missing" for name in sorted(expected - set(names))]
    faults += [f"{name} does not belong there" for name in names if not name.startswith("weightxform")]
    return faults


def check_sdist(path: Path) -> list[str]:
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    kept = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    kept |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "tests/simt/simt.h"}
    faults = [f"{name} is missing" for name in sorted(kept - names)]
    return faults + [f"{name} does not belong there" for name in sorted(names) if name.endswith(".so")]


def main(folder: str) -> None:
    wheels, sdists = sorted(Path(folder).glob("*.whl")), sorted(Path(folder).glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        sys.exit(f"{folder} must hold one wheel and one sdist, has {[p.name for p in (*wheels, *sdists)]}")
    faults = [f"{wheels[0].name}: {f}" for f in check_wheel(wheels[0])]
    faults += [f"{sdists[0].name}: {f}" for f in check_sdist(sdists[0])]
    print("\n".join(faults) or f"{wheels[0].name}, {sdists[0].name}: complete, no build paths")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main(sys.argv[1])
