"""Everything about a Hugging Face model that needs torch: reading its sites, loading, hashing."""

from peftref.backbone.hf.table import module_table, site_table

__all__ = ["module_table", "site_table"]
