"""Several adapters beside what else changes a model: groups of projections, DistributedDataParallel, FSDP2, experts, PEFT."""

from __future__ import annotations

import warnings

import loradash
import pytest
import torch
from loradash import DashConfig, add_adapter, apply_dash, mixed_batch, save_adapter, set_adapter, train_adapters
from support.several import BASE, X, alone, filled, network, two
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from loradash_kernels.rows import Adapter, dash_linear_rows, group_rows


class Parent(nn.Module):
    """Three layers that read one tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(20, width) for width in (8, 8, 12))

    def forward(self, x):
        return torch.cat((self.q(x), self.k(x), self.v(x)), -1)


def test_groups_follow_the_active_adapter_and_are_off_in_mixed_batches():
    models = []
    for grouped in (True, False):
        model = apply_dash(Parent(), DashConfig(r=3, directions=2))
        add_adapter(model, "b", DashConfig(r=2, directions=1, target_modules=["q", "v"]))
        add_adapter(model, "c", DashConfig(r=2, directions=1, target_modules=["k"]))
        filled(model)
        if grouped:
            loradash.group_projections(model, [("q", "k", "v")])
        models.append(model)
    names = ["b", None, "default", "c", "b", "default"]
    for name in ("default", "b", "c", "default"):
        for model in models:
            set_adapter(model, name)
        torch.testing.assert_close(models[0](X), models[1](X), rtol=1e-5, atol=1e-5)
        for model in models:
            wanted = torch.stack([alone(model, n)[i] for i, n in enumerate(names)])
            with mixed_batch(model, names):
                torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)


def test_peft_models_have_calls_of_their_own():
    from loradash.integrations.peft import DashLoraConfig
    from peft import get_peft_model

    model = get_peft_model(network(), DashLoraConfig(r=2, directions=2, target_modules=["0"]))
    for call in (
        loradash.adapter_names,
        lambda m: add_adapter(m, "b"),
        lambda m: set_adapter(m, "default"),
        lambda m: loradash.delete_adapter(m, "default"),
        lambda m: loradash.merge_adapters(m, {"default": 1}, "b"),
        lambda m: loradash.hotswap_adapter(m, "nowhere"),
        lambda m: loradash.mixed_batch(m, ["default"]).__enter__(),
        lambda m: loradash.export_lora(m, "nowhere", adapter="default"),
    ):
        with pytest.raises(TypeError, match="the adapters of this model are PEFT's; call"):
            call(model)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_wrapped_models(process_group, tmp_path):
    """DistributedDataParallel averages what trained when it was made; FSDP knows parameters by their places."""
    model = two()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ddp = nn.parallel.DistributedDataParallel(model)
    assert sum(buffer.numel() for _, buffer in ddp.named_buffers()) and not ddp.modules_buffers
    for call in (lambda: set_adapter(ddp, "b"), lambda: set_adapter(model, "b"), lambda: train_adapters(model, ["b"])):
        with pytest.raises(ValueError, match="'b' did not train when DistributedDataParallel was made"):
            call()
    del ddp
    set_adapter(model, "b")
    both = two()
    train_adapters(both, ["b"])
    ddp = nn.parallel.DistributedDataParallel(both, find_unused_parameters=True)
    set_adapter(ddp, "b")
    ddp(X).sum().backward()
    assert both[2].lora_b.grad.any()

    sharded = fully_shard(two(), mesh=process_group)
    for call in (
        lambda: set_adapter(sharded, "b"),
        lambda: add_adapter(sharded, "c", BASE),
        lambda: save_adapter(sharded, tmp_path, adapter="b"),
    ):
        with pytest.raises(ValueError, match=r"0 is sharded, .* hotswap_adapter\(model, path\)"):
            call()
    model = two()
    save_adapter(model, tmp_path, adapter="default")
    expected = alone(model, "default")
    filled_other = filled(two(), seed=7)
    sharded = fully_shard(filled_other, mesh=process_group)
    loradash.hotswap_adapter(sharded, tmp_path)
    torch.testing.assert_close(sharded(X), expected)
    names = ["b", None, "default", "b", "default", None]
    with loradash.mixed_batch(sharded, names):
        y = sharded(X)
    torch.testing.assert_close(y[2], expected[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y[0], expected[0], atol=1e-3)
    # Outside of FSDP's own forward pass the weight is a DTensor.
    inner = loradash.DashLinear(20, 4)
    inner.weight = nn.Parameter(distribute_tensor(inner.weight, process_group), requires_grad=False)
    rows = group_rows([0] * 6)
    with pytest.raises(ValueError, match="weight of a mixed batch is a DTensor"):
        dash_linear_rows(X, inner.weight, adapters=[Adapter(inner.lora_a, inner.lora_b)], rows=rows)


def test_models_with_experts_have_one_adapter():
    pytest.importorskip("transformers")
    from support import experts

    model = experts.adapted(experts.moe())
    for call in (
        lambda: add_adapter(model, "b", BASE),
        lambda: mixed_batch(model, ["default"]).__enter__(),
        lambda: loradash.merge_adapters(model, {"default": 1.0}, "b"),
    ):
        with pytest.raises(ValueError, match="experts' parameters have one adapter"):
            call()
    assert loradash.adapter_names(model) == ["default"]
    with pytest.raises(ValueError, match="target_parameters: experts' parameters have one adapter"):
        add_adapter(two(), "c", DashConfig(target_parameters=["experts"], target_modules=["0"]))


def test_peft_swaps_hot_for_its_lora_alone(tmp_path):
    """Refused before anything is written; what prepares a model for it changes no output."""
    from loradash.integrations.peft import DashLoraConfig
    from peft import get_peft_model
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    model = filled_peft(get_peft_model(network(), DashLoraConfig(r=2, directions=2, target_modules=["0", "2"])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    before = model(X)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but LORADASH was passed"):
        hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(model(X), before)
    prepare_model_for_compiled_hotswap(model, target_rank=4, config=model.peft_config)
    torch.testing.assert_close(model(X), before)


def filled_peft(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "lora_" in name and tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    return model
