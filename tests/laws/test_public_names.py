"""Every public name of peft is veneer's too, or is listed here with the reason why not."""

from __future__ import annotations

import peft

import veneer
from veneer import registry

TUNERS = {t.name: n for t, c in peft.PEFT_TYPE_TO_TUNER_MAPPING.items() if (n := c.__name__).endswith("Model")}
CONFIGS = {t.name: c.__name__ for t, c in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
TABLES = "a table from types to peft's own classes; veneer's is veneer.registry"
ABSENT: dict[str, str] = {
    **dict.fromkeys(TUNERS.values(), "one class, veneer.tuner.Tuner, stands for every method's"),
    **dict.fromkeys(
        [
            "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
            "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
            "PEFT_TYPE_TO_TUNER_MAPPING",
            "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
        ],
        TABLES,
    ),
    "bloom_model_postprocess_past_key_value": "a helper for a cache layout that transformers 5 no longer has",
    "shift_tokens_right": "a helper of transformers' own models",
}


def test_public_names() -> None:
    """`import veneer as peft` has them all, save those of types that are not registered and those listed."""
    other = [t for t in CONFIGS if t not in registry.types()]
    of_others = {names[t] for t in other for names in (TUNERS, CONFIGS) if t in names}
    missing = set(peft.__all__) - set(veneer.__all__) - of_others
    assert sorted(missing - set(ABSENT)) == []
    here = set(ABSENT) & set(veneer.__all__)
    assert not here, f"these are there now, take them out of ABSENT: {sorted(here)}"


def test_every_listed_name_is_pefts() -> None:
    assert set(ABSENT) <= set(peft.__all__) | set(dir(peft))


def test_the_types_are_pefts() -> None:
    """No type is invented, and a variant reached by an option has no type."""
    assert set(registry.types()) <= {t.name for t in peft.PeftType}
