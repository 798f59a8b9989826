"""What becomes of every kind of parent and model: adapted, made to call its layers, refused; the table of docs/layers.md."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from loradash import apply_dash, dash_layers, merge, merge_and_unload
from loradash.bypass import bypassed_children
from support.layers import LAYERS, WIDTH, config, linear
from torch import nn
from torch.nn import functional as F

TABLE = Path(__file__).parents[2] / "docs" / "layers.md"


class Fused(nn.Module):
    """Multiplies by a child's weight itself, and asks another for its dtype."""

    def __init__(self):
        super().__init__()
        self.fused, self.asked, self.inner = linear(), linear(), nn.ModuleDict({"deep": linear()})
        nn.init.zeros_(self.asked.weight)

    def forward(self, x):
        if isinstance(self.asked.weight, torch.Tensor) and x.dtype != self.asked.weight.dtype:
            x = x.to(self.asked.weight.dtype).to(self.asked.weight) + self.asked.weight.new_zeros(1)
        return self.asked(F.linear(x, self.fused.weight, self.fused.bias)) + x @ self.inner.deep.weight

    def tie_weights(self):
        self.asked.weight = self.fused.weight


class OwnAttention(nn.MultiheadAttention):
    """A subclass of torch's attention: its class cannot be exchanged."""


def attention():
    return nn.MultiheadAttention(WIDTH, 4, batch_first=True)


def mamba():
    transformers = pytest.importorskip("transformers")
    settings = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=8)
    return transformers.MambaForCausalLM(settings)


def wavlm():
    transformers = pytest.importorskip("transformers")
    settings = transformers.WavLMConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(32,),
        conv_stride=(5,),
        conv_kernel=(10,),
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return transformers.WavLMModel(settings)


def peft_model():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(nn.Sequential(linear()), peft.LoraConfig(target_modules=["0"], r=2))


PARENTS = {
    "`nn.MultiheadAttention` (`out_proj`)": (lambda: nn.Sequential(attention()), "adapted"),
    "`nn.TransformerEncoderLayer`, `nn.TransformerEncoder`": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True), 1),
        "adapted",
    ),
    "`nn.TransformerDecoderLayer`": (lambda: nn.Sequential(nn.TransformerDecoderLayer(WIDTH, 4, 64)), "adapted"),
    "subclass of `nn.MultiheadAttention`": (lambda: nn.Sequential(OwnAttention(WIDTH, 4)), "refused"),
    "transformers' Mamba (`out_proj`, `dt_proj`, `x_proj`)": (mamba, "refused"),
    "transformers' WavLM (`q_proj`, `k_proj`, `v_proj`, `out_proj`)": (wavlm, "refused"),
    "any parent whose code uses `self.child.weight`": (Fused, "refused"),
    "model inside `DistributedDataParallel`, `DataParallel`, FSDP1": (
        lambda: nn.DataParallel(nn.Sequential(linear())),
        "refused",
    ),
    "model with adapters of PEFT": (peft_model, "refused"),
    "model sharded by `fully_shard`, `replicate` or `parallelize_module`": (None, "refused"),
    "model that is itself one layer": (linear, "refused"),
    "model with adapters": (lambda: apply_dash(nn.Sequential(linear()), config()), "refused"),
}


@pytest.mark.parametrize("name", [name for name, (make, _) in PARENTS.items() if make])
def test_parents(name):
    make, expected = PARENTS[name]
    model = make()
    before = {n: (type(m), m.training) for n, m in model.named_modules()}
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    if expected == "adapted":
        apply_dash(model, config())
        assert len(dash_layers(model)) == sum(isinstance(m, nn.Linear) for m in make().modules())
        return
    with pytest.raises(ValueError):  # noqa: PT011  # every reason has its own words
        apply_dash(model, config())
    assert before == {n: (type(m), m.training) for n, m in model.named_modules()}
    assert grads == {n: p.requires_grad for n, p in model.named_parameters()}


def test_the_table_in_the_documents():
    """Every row says what the tests above see, and no kind is missing."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.read_text().splitlines() if "|" in line
    ]
    said = {cells[0]: cells[1] for cells in rows if cells[1] in ("adopted", "kept whole", "refused", "adapted")}
    assert said == {name: outcome for name, (_, outcome) in {**LAYERS, **PARENTS}.items()}


def test_what_a_parent_uses_is_read_from_its_code():
    assert bypassed_children(Fused()) == {"fused": "Fused.forward", "inner.deep": "Fused.forward"}
    assert bypassed_children(nn.Sequential(linear())) == {}
    message = r"2 layers whose parent .* fused \(in Fused.forward\), inner.deep .*exclude_modules=\['deep', 'fused'\]"
    with pytest.raises(ValueError, match=message):
        apply_dash(Fused(), config())
    model = apply_dash(Fused(), config(exclude_modules=["deep", "fused"]))
    assert set(dash_layers(model)) == {"asked"}
    with pytest.warns(UserWarning, match="would be passed by: fused"):
        apply_dash(Fused(), config(bypassed="warn"))


ATTENTION = [
    {"batch_first": True},
    {"batch_first": False},
    {"batch_first": True, "bias": False},
    {"kdim": 24, "vdim": 40},
    {"add_bias_kv": True, "add_zero_attn": True},
]


@pytest.mark.parametrize("options", ATTENTION)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attention_gives_what_its_merged_weight_gives(options, mode):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(WIDTH, 4, **options)
    model = apply_dash(nn.ModuleDict({"attention": copy.deepcopy(plain)}), config())
    ours = getattr(model["attention"], mode)()
    getattr(plain, mode)()
    nn.init.normal_(ours.out_proj.lora_b)
    plain.out_proj.weight = nn.Parameter(plain.out_proj.weight + ours.out_proj.delta())
    query = torch.randn(2, 5, WIDTH)
    key, value = torch.randn(2, 5, options.get("kdim", WIDTH)), torch.randn(2, 5, options.get("vdim", WIDTH))
    causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    padding = torch.zeros(2 if options.get("batch_first") else 5, 5 if options.get("batch_first") else 2).bool()
    padding[0, -1] = True
    calls = [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {
            "attn_mask": torch.randn(
                query.shape[1 if options.get("batch_first") else 0], 5 if options.get("batch_first") else 2
            )
        },
        {"key_padding_mask": padding},
    ]
    if options.get("batch_first"):
        calls += [{"attn_mask": causal, "is_causal": True, "need_weights": False}, {"attn_mask": causal}]
    for arguments in calls:
        expected, weights = plain(query, key, value, **arguments)
        y, seen = ours(query, key, value, **arguments)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert (weights is None) == (seen is None)
        if seen is not None:
            torch.testing.assert_close(seen, weights)
    y, _ = ours(query[0], key[0], value[0])
    torch.testing.assert_close(y, plain(query[0], key[0], value[0])[0], rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert ours.out_proj.lora_b.grad.any()


def test_attention_keeps_keys_pickles_and_types(tmp_path):
    model = apply_dash(nn.Sequential(attention()), config())
    assert isinstance(model[0], nn.MultiheadAttention)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(again[0](x, x, x)[0], model[0](x, x, x)[0])
    nested = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(4, WIDTH)])
    with pytest.raises(ValueError, match="nested"):
        model[0].eval()(nested, nested, nested)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_gives_one_output_in_every_mode(norm_first, activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 64, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    encoder = apply_dash(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first), config())
    for dash in dash_layers(encoder).values():
        nn.init.normal_(dash.lora_b)
    x = torch.randn(3, 6, WIDTH)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    expected = encoder.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        seen = encoder.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(seen[~padding], expected[~padding], rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), encoder.train()(x), rtol=1e-4, atol=1e-4)


class Mixin:
    def fuse_projections(self, fuse=True):
        self.both = nn.Linear(WIDTH, 2 * WIDTH)
        self.both.weight = nn.Parameter(torch.cat([self.q.weight.data, self.k.weight.data]))
        self.fused = fuse


class Fusing(nn.Module, Mixin):
    """As diffusers' attentions do, whose processors then call the fused layer."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = linear(), linear(), linear()


def adapted_by(door):
    if door == "apply_dash":
        return apply_dash(nn.Sequential(Fusing()), config(target_modules=["k", "v"]))
    peft = pytest.importorskip("peft")
    from loradash.integrations.peft import DashLoraConfig

    return peft.get_peft_model(nn.Sequential(Fusing()), DashLoraConfig(r=2, directions=2, target_modules=["k", "v"]))


@pytest.mark.parametrize("door", ["apply_dash", "peft"])
def test_weights_with_adapters_beside_them_are_not_fused(door):
    model = adapted_by(door)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (fusing,) = (m for m in each.modules() if isinstance(m, Fusing))
        with pytest.raises(
            ValueError, match=r"Fusing.fuse_projections makes one layer of the weights of k, and would pass"
        ):
            fusing.fuse_projections()
        assert not hasattr(fusing, "both")
        merge(each) if door == "apply_dash" else each.merge_adapter()
        fusing.fuse_projections(fuse=2)
        assert fusing.fused == 2 and torch.equal(fusing.both.weight[WIDTH:], fusing.k.weight)


def test_plain_layers_fuse_again():
    model = nn.Sequential(Fusing(), Fusing())
    apply_dash(model, config(target_modules=["0.k"]))
    model[1].fuse_projections()
    assert "fuse_projections" in vars(model[0]) and "fuse_projections" not in vars(model[1])
    merge_and_unload(model)[0].fuse_projections()
    assert "fuse_projections" not in vars(model[0])
