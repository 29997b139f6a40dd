"""The methods inside vLLM: a plug-in that vLLM loads by itself.

A request asks for a method with ``SamplingParams(extra_args={"foveate": "clvs(smoothing=0.7)"})``,
over HTTP with ``"vllm_xargs": {"foveate": "..."}``. Requests without one are the plain model.

`admission` refuses what cannot run, in the front end. `requests` knows which row of a step belongs
to which request. `plan` decides once per step which rows are edited. `rows` shows a method the
columns that it needs and one more for the rest of the row; `cache` reads them from the KV cache.
`backend` puts the result into what the attention kernel gave. `hidden` lets a method read what
enters a layer, `prompts` a whole prompt's, and `logits` edits the next token's. `blocks` keeps
edited blocks of the KV cache apart from plain ones. `second` makes the prompt of a second stream,
and `twins` keeps it in step with its request. `watch` stops a step that was not edited and counts
what was, `count` brings that to the client. `engine` asks a vLLM of our own, and `reading` brings
attention back from it. `compat` and `compat_twins` name every place of vLLM that is not a plug-in.

On GPUs `gpus` takes the place of `backend`, `strided` of `cache`, with the Triton `kernels`, and
`compat_gpus` names what is replaced besides. `runners` knows the rows of both model runners, and
`step` what is edited in a step.
"""

from __future__ import annotations

import os


def switched_off() -> bool:
    """Whether ``FOVEATE_VLLM=off`` in the environment leaves vLLM as it is."""
    return os.environ.get("FOVEATE_VLLM", "").lower() in ("off", "0")


def register() -> None:
    """Switch the plug-in on in this process; vLLM calls it (entry point `vllm.general_plugins`)."""
    if switched_off():
        return
    from . import compat, compat_gpus, compat_twins, orphans

    compat.check_version()
    compat.install()
    compat_twins.install()
    compat_gpus.install()
    orphans.follow()
