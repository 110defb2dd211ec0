"""Packages of the wheel: the library, and `configs/` inside of it."""

import setuptools

setuptools.setup(
  packages=[
    *setuptools.find_packages(include=['fedjax_llm', 'fedjax_llm.*']),
    'fedjax_llm.configs',
  ],
  package_dir={'fedjax_llm.configs': 'configs'},
)
