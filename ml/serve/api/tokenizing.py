"""``/tokenize`` and ``/detokenize``, as in vLLM."""

import asyncio
from typing import Any

from fastapi import APIRouter

from ml.serve.api.protocol import DetokenizeBody, TokenizeBody
from ml.serve.api.server import Server
from ml.serve.text.fields import FieldError, Fields
from ml.serve.text.messages import chat_messages


def tokenizing(server: Server) -> APIRouter:
    """Both endpoints."""
    router = APIRouter(tags=["tokens"])
    model = server.model

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        sent = body.sent()
        server.check_model(sent)
        if (body.prompt is None) == (body.messages is None):
            raise FieldError("prompt", "give either prompt or messages")
        fields = Fields(sent, TokenizeBody.model_fields)

        def encode() -> list[int]:
            if body.messages is not None:
                return model.encode_chat(chat_messages(fields), add_generation_prompt=body.add_generation_prompt)
            text = fields.text("prompt") or ""
            return model.encode(text) if body.add_special_tokens else model.tokenizer.encode(text, parse_special=True)

        tokens = await asyncio.to_thread(encode)
        return {"count": len(tokens), "max_model_len": server.settings.max_length, "tokens": tokens}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        server.check_model(body.sent())
        last = model.config.vocab_size - 1
        if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) <= last:
            raise FieldError("tokens", f"must lie between 0 and {last}")
        text = await asyncio.to_thread(model.tokenizer.decode, body.tokens, skip_special=False)
        return {"prompt": text}

    return router
