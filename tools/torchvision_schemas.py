"""Let PyPI's torchvision import beside a CPU build of torch, in a test environment.

    python tools/torchvision_schemas.py

Its compiled operators need CUDA libraries and do not load, and then it describes operators that
nobody declared. This declares them, in the installed file. Transforms do not use them. Nothing is
changed where torchvision can be imported.
"""

import importlib.util
import pathlib
import re
import subprocess
import sys

DECLARED = "# declared by foveate's test environment\n"


def main() -> None:
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        sys.exit("torchvision is not installed here.")
    file = pathlib.Path(found.origin).with_name("_meta_registrations.py")
    text = file.read_text()
    if (
        subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode
        == 0
    ):
        return
    names = re.findall(r'register_fake\("torchvision::(\w+)"\)', text)
    schema = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    lines = "".join(f"_declared.define({schema.format(name)!r})\n" for name in names)
    library = '_declared = torch.library.Library("torchvision", "DEF")\n'
    after = "import torch.library\n"
    file.write_text(text.replace(after, after + DECLARED + library + lines, 1))


if __name__ == "__main__":
    main()
