"""Where the packages are: `serve/` and `quantize/` are installed as parts of `packhorse`, since
their own names are too general for a machine with other software. All else is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        "packhorse",
        *(
            f"packhorse.{name}"
            for name in find_packages(include=["quantize", "quantize.*", "serve", "serve.*"])
        ),
    ],
    package_dir={"packhorse.quantize": "quantize", "packhorse.serve": "serve"},
)
