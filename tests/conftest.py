"""Settings that hold for every test."""

from __future__ import annotations

import os

import hypothesis

# Read when transformers is imported, hence here: no test asks a network for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Machines that run the tests differ in speed by more than any deadline allows for.
hypothesis.settings.register_profile("peftref", deadline=None, derandomize=True, print_blob=True)
# Ten times the examples, and others every night.
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=1000, print_blob=True)
# Failures as they were drawn, at once: shrinking one takes minutes here.
hypothesis.settings.register_profile(
    "unshrunk", deadline=None, derandomize=True, print_blob=True,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate))
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "peftref"))
