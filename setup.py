"""Which packages a wheel holds; everything else is in pyproject.toml.

The folder `cli` is installed as `stn_fx_cli`, so that no package named `cli` reaches site-packages. The list is
computed here because setuptools cannot mix a search with a renamed folder in pyproject.toml, and a list kept by hand
goes stale.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["stn_fx", "stn_fx.*"]), "stn_fx_cli"],
    package_dir={"stn_fx_cli": "cli"},
    package_data={"stn_fx": ["py.typed"]},
)
