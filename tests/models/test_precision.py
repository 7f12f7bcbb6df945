"""Networks whose heavy parts compute in bf16 or are compiled, and the clock of training steps."""

import copy

import pytest
import torch

from models.clock import Clock, part, running
from models.networks.layers import HashNetwork
from models.networks.precision import HeavyModule, compile_heavy, set_precision
from models.registry import METHODS
from tests.models.players import Fixed, build, global_batch


@pytest.mark.parametrize("name", ["dah", "igan", "sigan", "ucdir"])
def test_only_the_heavy_parts_compute_in_bf16(name: str) -> None:
    method = build(name)
    networks = method.state_modules()
    assert any(isinstance(module, HeavyModule) for module in networks.modules())
    seen: set[torch.dtype] = set()
    for module in networks.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda _, __, made: seen.add(made.dtype))
    method.begin(Fixed(0), Fixed(1))
    method.train()
    for precision, kinds in (("float32", {torch.float32}), ("bf16", {torch.float32, torch.bfloat16})):
        set_precision(networks, precision)
        seen.clear()
        for player in filter(method.is_active, method.players):
            loss, terms = method.loss(player, global_batch(0))
            loss.backward()
            assert all(each.dtype == torch.float32 for each in (loss, *terms.values()))
        assert seen == kinds
    assert method.encode(global_batch(0).target.x).dtype == torch.float32  # type: ignore[union-attr]
    parameters = [p for player in method.players.values() for p in player.networks.parameters()]
    assert all(p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32) for p in parameters)


def test_bf16_gives_nearly_the_codes_of_float32() -> None:
    method, x = build("dah"), global_batch(0).source.x  # type: ignore[union-attr]
    plain = method.encode(x)
    set_precision(method.state_modules(), "bf16")
    reduced = method.encode(x)
    assert not torch.equal(plain, reduced) and (plain - reduced).abs().max() < 0.1
    assert any(isinstance(module, HashNetwork) and module.precision == torch.bfloat16 for module in copy.deepcopy(method.state_modules()).modules())


def test_compiled_networks_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    method, x = build("dah"), global_batch(0).source.x  # type: ignore[union-attr]
    plain, compiled = method.encode(x), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled(self, backend="aot_eager", **options))  # no C compiler needed
    state = list(method.state_modules().state_dict())
    compile_heavy(method.state_modules())
    torch.testing.assert_close(method.encode(x), plain, atol=1e-5, rtol=1e-4)
    assert list(method.state_modules().state_dict()) == state


def test_every_method_with_a_network_on_images_has_a_heavy_part() -> None:
    without = {name for name in METHODS if not any(isinstance(each, HeavyModule) for each in build(name).state_modules().modules())}
    assert all(build(name).players == {} for name in without)


def test_a_clock_counts_inner_parts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 3.5, 5.5, 6.0])
    monkeypatch.setattr("models.clock.time.perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    with running(clock):
        with part("forward"), part("gathering"):  # from 1 to 3
            pass
        with part("backward"):  # from 5.5 to 6
            pass
    with part("after"):
        pass
    assert dict(clock.seconds) == {"forward": 1.5, "gathering": 2.0, "backward": 0.5}
    assert str(clock) == "forward 38 %, gathering 50 %, backward 12 %"
