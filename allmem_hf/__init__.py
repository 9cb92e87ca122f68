"""AllMem for Hugging Face: configuration, model, cache, and the export that ships them.

Layer 2 of the project: imports `kernels` and nothing above itself.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from allmem_hf.cache_allmem import AllMemCache
from allmem_hf.configuration_allmem import AllMemConfig
from allmem_hf.modeling_allmem import AllMemForCausalLM, AllMemModel

# exported folders then load without running the code they carry
AutoConfig.register(AllMemConfig.model_type, AllMemConfig, exist_ok=True)
AutoModel.register(AllMemConfig, AllMemModel, exist_ok=True)
AutoModelForCausalLM.register(AllMemConfig, AllMemForCausalLM, exist_ok=True)

__all__ = ["AllMemCache", "AllMemConfig", "AllMemForCausalLM", "AllMemModel"]
