"""Everything about a Hugging Face model that needs torch: reading its sites, loading, hashing."""

from peftref.backbone.hf.load import Task, load_backbone, meta_model, quiet
from peftref.backbone.hf.modules import head_modules
from peftref.backbone.hf.table import module_table, site_table
from peftref.backbone.hf.weights import weight_hash

__all__ = ["Task", "head_modules", "load_backbone", "meta_model", "module_table", "quiet",
           "site_table", "weight_hash"]
