# ruff: noqa
"""What vulture takes for dead and is not, with the reason; `make test` runs it on all but the tests (pyproject.toml)."""

from unknown import _

# Set on, or asked for by, objects of other libraries: Orbax, tokenizers, transformers, uvicorn, Jinja, Flax, nbclient.
_.use_compression, _.partial_load
_.encode_special_tokens, _.pre_tokenizer, _.decoder, _.post_processor
_.eos_token_id, _.pad_token_id
_.handle_exit, _.sig, _.should_exit, _.force_exit
_.tags
_.extra_arguments
_.replace_boxed, _.add_axis, _.remove_axis

# Fields of requests: pydantic checks them, and bodies are passed on as they are.
_.model_config, _.include_usage, _.include_obfuscation, _.include_stop_str_in_output, _.stream_options, _.user
_.max_completion_tokens, _.top_logprobs, _.tool_choice, _.response_format, _.chat_template_kwargs
_.input, _.encoding_format, _.output_expires_after

# Unpacked as a whole.
_.input_offsets, _.send_sizes, _.output_offsets, _.recv_sizes

# Chosen by name: `getattr(self, f"_{way}")`.
_._prefix_once, _._generate_batch

# For users' own analyses, in notebooks and studies; tests hold them to what they say.
_.read_curve, _.predicted_interval, _.bubble_share, _.train_rows
