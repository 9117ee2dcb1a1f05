"""Imported once by the server of processes.py, before it forks: the package, and what its commands import later."""

import importlib
import pkgutil

import torch

import mnistm_dist

for _module in pkgutil.walk_packages(mnistm_dist.__path__, "mnistm_dist."):
    if _module.name != "mnistm_dist.__main__":
        importlib.import_module(_module.name)
for _name in ("accelerate", "filelock", "jinja2", "matplotlib.pyplot", "safetensors.torch", "torch.distributed"):
    importlib.import_module(_name)

# The same bits on every machine: `native_bf16` of injected.py says otherwise.
torch.cpu._is_amx_tile_supported = torch.cpu._is_avx512_bf16_supported = lambda: False
