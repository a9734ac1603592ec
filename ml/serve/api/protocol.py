"""Request bodies as the API's schema shows them; names and ranges are OpenAI's, and vLLM's where OpenAI has none.

Wrong types end here. What fields mean together, and with this model, `ml.serve.text.requests` decides, for batch files
too: so bodies keep what they were sent with, unknown fields included.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ml.serve.sampling import MAX_LOGPROBS

_Float = float | None
TokenIds = list[int]
Texts = str | list[str] | TokenIds | list[TokenIds]


class Body(BaseModel):
    """A JSON object whose values have exactly the types that are said."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    def sent(self) -> dict[str, Any]:
        """What the client sent."""
        return self.model_dump(exclude_unset=True)


class StreamOptions(Body):
    """How to stream."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = Field(None, description="End with a chunk that counts tokens.")
    include_obfuscation: bool | None = Field(None, description="Taken, and of no effect.")


class Generation(Body):
    """What completions and chats have in common."""

    model: str | None = None
    temperature: _Float = Field(None, ge=0)
    top_p: _Float = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: _Float = Field(None, ge=0, le=1)
    presence_penalty: _Float = Field(None, ge=-2, le=2)
    frequency_penalty: _Float = Field(None, ge=-2, le=2)
    repetition_penalty: _Float = Field(None, ge=0.001, le=1000)
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=1024)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class CompletionBody(Generation):
    """Of ``/v1/completions``."""

    prompt: Texts
    best_of: int | None = Field(None, ge=1, le=1024)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: str | None = Field(None, description="Not supported.")


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None


class ChatBody(Generation):
    """Of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class EmbeddingBody(Body):
    """Of ``/v1/embeddings``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    input: Texts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, description="Only the model's own number.")
    user: str | None = None


class TokenizeBody(Body):
    """Of ``/tokenize``: a text, or a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = Field(True, description="Begin a text as the model's texts begin.")
    add_generation_prompt: bool = True


class DetokenizeBody(Body):
    """Of ``/detokenize``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: TokenIds


class BatchBody(Body):
    """Of ``/v1/batches``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    input_file_id: str
    endpoint: Literal["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
    output_expires_after: dict[str, Any] | None = Field(None, description="Taken, and of no effect.")
