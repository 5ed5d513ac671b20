"""Rules: how each operator family behaves in the base, linearized and response pass; one file per family.

Layers of this floor, lowest first: ``layout`` (where the batch lies in a tensor), ``structure`` (how a parameter
responds), ``tangent`` (how a tangent passes through an operator), ``rule`` (the interface and the registry), then one
file per operator family.  The functions that emitted code calls live next to the rule that emits them.
"""

from stn_fx.rules.rule import REGISTRY, Registry, Rule

__all__ = ["REGISTRY", "Registry", "Rule", "load_builtin_rules"]


def load_builtin_rules() -> Registry:
    """Import every file of the built-in rules (each registers itself) and return the registry."""
    from stn_fx.rules import (  # noqa: F401  (imported for registration)
        activation_terms,
        attention,
        convolution,
        custom,
        drop_path,
        dropout,
        elementwise,
        embedding,
        image_sites,
        input_sites,
        linear,
        noise,
        normalization,
        opaque,
        own_augmentations,
        pooling,
        recurrent,
        structural,
        token_sites,
        weight_drop,
    )

    return REGISTRY
