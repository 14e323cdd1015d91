"""An analytical model of one layer call's time on a GPU: these kernels, vLLM's and SGLang's."""
