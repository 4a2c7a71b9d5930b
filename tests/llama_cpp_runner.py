"""llama.cpp on one GGUF file, in a process of its own: its threads and torch's disturb each other in one. JSON in and out.

{"model": PATH, "ids": [...], "count": N}   ->  {"logits": [[...]], "greedy": [...]}
{"model": PATH, "texts": [...]}             ->  {"tokens": [[...]], "with_specials": [[...]], "bytes": [[...]], "eos": ID}
"""

import json
import sys


def main() -> None:
    import llama_cpp
    import llama_cpp.llama_cpp as low

    defaults = low.llama_model_default_params

    def plain() -> object:
        """Without weights rearranged for AMX tiles: those kernels crash where tiles are not granted to the process."""
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    low.llama_model_default_params = plain
    asked = json.load(sys.stdin)
    # Full precision where there is a choice.
    model = llama_cpp.Llama(
        asked["model"], n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True, type_k=0, type_v=0, flash_attn=False,
        n_gpu_layers=0,
    )  # fmt: skip
    answer = {}
    if "texts" in asked:
        texts = [text.encode() for text in asked["texts"]]
        tokens = [model.tokenize(text, add_bos=False, special=False) for text in texts]
        answer = {
            "tokens": tokens, "with_specials": [model.tokenize(text, add_bos=False, special=True) for text in texts],
            "bytes": [list(model.detokenize(ids)) for ids in tokens], "eos": model.token_eos(),
        }  # fmt: skip
    else:
        ids = asked["ids"]
        model.eval(ids)
        answer["logits"] = model.scores[: len(ids)].tolist()
        greedy = []
        for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0, reset=True):
            greedy.append(int(token))
            if len(greedy) >= asked["count"]:
                break
        answer["greedy"] = greedy
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
