"""What it means why a reply ended: the finish reasons of providers and servers, each with its source."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

End = Literal["whole", "cut", "filtered", "broken"]


class Reasons(NamedTuple):
    """``reasons``: in small letters. ``source``: whose they are, and where they are stated or were seen: a
    page, or ``owner/project#number`` of a report on GitHub."""

    end: End
    reasons: tuple[str, ...]
    source: str


_OPENAI = "OpenAI's finish_reason (github.com/openai/openai-openapi)"
_ANTHROPIC = "Anthropic's stop_reason (platform.claude.com/docs/build-with-claude/handling-stop-reasons)"
_GEMINI = "Gemini's FinishReason (googleapis.github.io/js-genai, enums/types.FinishReason)"
_BEDROCK = (
    "Bedrock Converse's stopReason "
    "(docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html)"
)
_WATSONX = "watsonx's finish reason (ibm.github.io/watsonx-ai-node-sdk, TextChatResultChoice)"
_ZHIPU = "Zhipu's finish_reason (docs.bigmodel.cn/api-reference)"
REASONS: tuple[Reasons, ...] = (
    Reasons("whole", ("stop", "tool_calls", "function_call"), _OPENAI),
    Reasons("whole", ("end_turn", "stop_sequence", "tool_use", "pause_turn"), _ANTHROPIC),
    Reasons(
        "whole",
        ("eos_token",),
        "text-generation-inference before 2.3 (huggingface/text-generation-inference#2344)",
    ),
    Reasons("whole", ("finish_reason_unspecified",), _GEMINI),
    Reasons("whole", ("load",), "Ollama: the model was loaded and wrote nothing (ollama/ollama#4235)"),
    Reasons("cut", ("length",), _OPENAI),
    Reasons("cut", ("max_tokens", "model_context_window_exceeded"), _ANTHROPIC),
    Reasons("cut", ("max_output_tokens",), "OpenAI's responses (docs.nvidia.com/nemo/relay, FinishReason)"),
    Reasons("cut", ("model_length",), "Mistral's finish_reason (docs.rs/mistral-openapi-client)"),
    Reasons("cut", ("time_limit",), _WATSONX),
    Reasons("cut", ("repetition_truncation",), "words seen at Xiaomi's MiMo, when it repeats itself"),
    Reasons("filtered", ("content_filter",), _OPENAI),
    Reasons("filtered", ("refusal",), _ANTHROPIC),
    Reasons(
        "filtered",
        ("safety", "recitation", "blocklist", "prohibited_content", "spii", "language", "image_safety"),
        _GEMINI,
    ),
    Reasons(
        "filtered",
        ("model_armor",),
        "Vertex AI's FinishReason (cloud.google.com/python, vertexai.generative_models)",
    ),
    Reasons("filtered", ("guardrail_intervened", "content_filtered"), _BEDROCK),
    Reasons("filtered", ("sensitive",), _ZHIPU),
    Reasons("broken", ("other", "malformed_function_call"), _GEMINI),
    Reasons(
        "broken",
        ("error",),
        "OpenRouter, Mistral, watsonx and Together (togethercomputer/together-python#153)",
    ),
    Reasons("broken", ("cancelled",), _WATSONX),
    Reasons("broken", ("abort",), "vLLM and SGLang (vllm-project/vllm#57082, sgl-project/sglang#6693)"),
    Reasons("broken", ("insufficient_system_resource",), "DeepSeek's finish_reason (docs.rs/ds-api)"),
    Reasons("broken", ("network_error",), _ZHIPU),
    Reasons(
        "broken",
        ("unload",),
        "Ollama: the model was taken out of memory (github.com/ollama/ollama/blob/main/docs/api.md)",
    ),
)
_ENDS: dict[str, End] = {reason: row.end for row in REASONS for reason in row.reasons}


def end_of(reason: Any) -> End:
    """What a finish reason means; one that nobody knows, and none, is a whole reply."""
    return _ENDS.get(str(reason).lower() if reason is not None else "", "whole")
