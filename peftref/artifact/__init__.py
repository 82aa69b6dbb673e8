"""Saved adapters: folders of JSON and safetensors."""

from peftref.artifact.folder import Artifact, read, replaced_folder, write_files
from peftref.artifact.peft_format import write_peft

__all__ = ["Artifact", "read", "replaced_folder", "write_files", "write_peft"]
