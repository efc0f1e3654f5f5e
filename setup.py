"""What pyproject.toml cannot say: a wheel keeps `configs/` and `launch/` inside the package (`config/shipped.py`)."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent
INSIDE = ("configs", "launch")
OF_A_CLONE = ("launch/docs.py", "launch/pages.py")  # write the documents and the site, which a wheel has not


def put_inside(folder) -> None:
    """Copies the files of these folders into `folder/molora_jax`."""
    for file in (file for name in INSIDE for file in sorted((ROOT / name).glob("*.py"))):
        path = file.relative_to(ROOT)
        if path.as_posix() not in OF_A_CLONE:
            target = pathlib.Path(folder, "molora_jax", path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


class Build(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            put_inside(self.build_lib)


if __name__ == "__main__":
    setup(cmdclass={"build_py": Build})
