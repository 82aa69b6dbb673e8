"""Everything about a Hugging Face model that needs torch: reading its sites, loading, hashing."""

from peftref.backbone.hf.infer import infer
from peftref.backbone.hf.load import Task, load_backbone, meta_model, quiet
from peftref.backbone.hf.modules import head_modules
from peftref.backbone.hf.table import inferred_table, module_table, site_table
from peftref.backbone.hf.weights import weight_hash

__all__ = ["Task", "head_modules", "infer", "inferred_table", "load_backbone", "meta_model",
           "module_table", "quiet", "site_table", "weight_hash"]
