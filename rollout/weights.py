"""Receiving weights inside vLLM's worker process: mixed into its Worker class as `worker_extension_cls`."""

from __future__ import annotations

from typing import Any

from rltk.rollout import weight_file


class WeightReceiver:
    """Methods that `collective_rpc` reaches by name. `self` is vLLM's Worker."""

    def rltk_load_weights(self, path: str) -> tuple[str, int]:
        """Load a weight file (rltk/rollout/weight_file.py) in place. Returns the checksum of the bytes read and the
        number of tensors. The checksum is of what arrived, computed here, not copied from the header."""
        checksum, tensors = weight_file.read(path)
        self.reload_weights(weights_iterator=iter(tensors.items()))  # type: ignore[attr-defined]
        refresh_vocabulary_layers(self.model_runner.get_model())  # type: ignore[attr-defined]
        return checksum, len(tensors)


def refresh_vocabulary_layers(model: Any) -> None:
    """Repack what embedding and head keep beside their weight.

    On CPU vLLM packs the head's weight for its GEMM after loading. A *tied* head shares the embedding's parameter, so
    a reload never touches it and its packed copy goes stale: log-probs are then off by about 1, silently.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            module.quant_method.process_weights_after_loading(module)
