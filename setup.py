"""Everything declarative is in pyproject.toml; this file is the build's one programmable step.

The package is pure Python so far. The compiled kernels (csrc/, CMake + pybind11, without torch) attach here as a
`build_ext` command, which pyproject.toml cannot express.
"""

from setuptools import setup

setup()
