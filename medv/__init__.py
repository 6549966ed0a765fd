"""medv: a research companion for LLaDA-MedV, the masked-diffusion vision-language model for biomedical images.

The four public names load on first use, so that `import medv` alone is instant.
"""

from importlib import import_module

__version__ = "0.2.0"
__all__ = ["MedVConfig", "MedVForMaskedDiffusion", "MedVProcessor", "SamplerConfig"]

_HOMES = {
    "MedVConfig": "medv.model.configuration",
    "MedVForMaskedDiffusion": "medv.model.modeling",
    "MedVProcessor": "medv.model.processing",
    "SamplerConfig": "medv.diffusion.config",
}


def __getattr__(name: str):
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'medv' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
