"""AllMem for Hugging Face: configuration, model, cache, and the export that ships them.

Layer 2 of the project: imports `kernels` and nothing above itself.
"""

from allmem_hf.cache_allmem import AllMemCache
from allmem_hf.configuration_allmem import AllMemConfig
from allmem_hf.modeling_allmem import AllMemForCausalLM, AllMemModel

__all__ = ["AllMemCache", "AllMemConfig", "AllMemForCausalLM", "AllMemModel"]
