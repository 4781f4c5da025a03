"""
NanoChat with value embeddings, for transformers 5.0 or newer:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Every layer has an embedding table of its own, whose row of a token is added to the token's values
in attention (from modded-nanogpt; compare arXiv 2410.17897). The rest is transformers' NanoChat.

Shapes: B batch, T tokens, C width, H heads, D head size.
"""

from torch import nn
from transformers import NanoChatConfig, NanoChatForCausalLM, NanoChatModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.nanochat.modeling_nanochat import (
    NanoChatAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)


class NanoChatValueEmbedsConfig(NanoChatConfig):
    model_type = "nanochat_value_embeds"


class ValueEmbedsAttention(NanoChatAttention):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        kv_dim = config.num_key_value_heads * self.head_dim
        self.value_embed = nn.Embedding(config.vocab_size, kv_dim)

    def forward(
        self,
        hidden_states,        # (B, T, C)
        position_embeddings,  # cosines and sines, (B, T, D) each
        attention_mask=None,
        past_key_values=None,
        token_ids=None,       # (B, T)
        **kwargs,
    ):
        """(output (B, T, C), attention weights or None)"""
        B, T, _ = hidden_states.shape
        queries = self.q_proj(hidden_states)
        keys = self.k_proj(hidden_states)
        values = self.v_proj(hidden_states) + self.value_embed(token_ids)

        # (B, H, T, D); positions first, then norms
        queries = queries.view(B, T, -1, self.head_dim).transpose(1, 2)
        keys = keys.view(B, T, -1, self.head_dim).transpose(1, 2)
        values = values.view(B, T, -1, self.head_dim).transpose(1, 2)
        queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
        queries = self.q_norm(queries)
        keys = self.k_norm(keys)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)

        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(B, T, -1)), weights


class NanoChatValueEmbedsModel(NanoChatModel):
    config_class = NanoChatValueEmbedsConfig

    def __init__(self, config):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = ValueEmbedsAttention(config, layer_idx)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        if input_ids is None:
            raise ValueError("value embeddings are looked up by token, so input_ids are needed")
        # keywords that the model does not know reach the attention of every layer
        return super().forward(input_ids=input_ids, token_ids=input_ids, **kwargs)


class NanoChatValueEmbedsForCausalLM(NanoChatForCausalLM):
    config_class = NanoChatValueEmbedsConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = NanoChatValueEmbedsModel(config)
        self.post_init()
