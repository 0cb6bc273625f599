"""Triton's interpreter, without doing the same work at each call of one kernel function by another.

It patches ``triton.language`` there, which walks every name of the module: half of all its time. The language is
patched already, by the launch.
"""

from __future__ import annotations

from typing import Any

import triton.runtime.interpreter as interpreter


def install() -> None:
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(function.__globals__))
        return patch(function)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh
