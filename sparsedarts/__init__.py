"""Search, prune and audit sparse neural architectures. `import sparsedarts as sd`; every name loads its module when first used."""
__version__ = "0.1.0"

from importlib import import_module as _import

_WHERE = {
    "data.loading": ("load_data",),
    "sparse.masks": ("Masks",),
    "sparse.layers": ("MaskedConv2d", "MaskedLinear", "sparsify", "densify", "masks_of", "apply_masks"),
    "sparse.holding": ("hold",),
    "sparse.cost": ("cost",),
    "sparse.compaction": ("compact",),
    "pruning.oneshot": ("prune",),
    "pruning.saliency": ("Examples",),
    "pruning.protocols": ("protocol",),
    "pruning.pruners": ("Pruner",),
    "pruning.dynamic": ("DynamicPruner",),
    "nets.resnets": ("resnet",),
    "nets.vggs": ("vgg",),
    "space.genotypes": ("Genotype",),
    "space.catalogue": ("genotypes",),
    "space.reading": ("genotype",),
    "space.cells": ("derive",),
    "space.draw": ("draw",),
    "space.darts": ("supernet",),
    "training.engine": ("train", "evaluate"),
    "training.retraining": ("retrain",),
    "strategy.search": ("search",),
    "reporting.runs": ("reproduce",),
}
_NAMES = {name: module for module, names in _WHERE.items() for name in names}
__all__ = ["__version__", *_NAMES]


def __getattr__(name):
    if name not in _NAMES:
        raise AttributeError(f"module 'sparsedarts' has no attribute {name!r}; it has {', '.join(sorted(_NAMES))} and its sub-packages")
    value = getattr(_import(f"sparsedarts.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_NAMES])
