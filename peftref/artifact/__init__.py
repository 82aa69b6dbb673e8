"""Saved adapters: folders of JSON and safetensors."""

from peftref.artifact.folder import Artifact, read, replaced_folder, write_files
from peftref.artifact.peft_format import write_peft
from peftref.artifact.reuse import tensors_for

__all__ = ["Artifact", "read", "replaced_folder", "tensors_for", "write_files", "write_peft"]
