import torch

from trainer.hashing import hash_bits, key_of, permutation, uniform, uniform_of


def test_a_permutation_holds_every_number_once_and_depends_on_its_keys():
    first, second = permutation(1000, key_of(0, "epoch")), permutation(1000, key_of(1, "epoch"))
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(first, permutation(1000, key_of(0, "epoch")))
    assert (first != second).float().mean() > 0.9


def test_uniform_numbers_are_uniform_and_uncorrelated_between_keys():
    ids = torch.arange(200_000, dtype=torch.int64)
    draws = torch.stack([uniform(ids, key_of(0, name)) for name in ("crop", "flip", "blur")])
    assert draws.min() >= 0
    assert draws.max() < 1
    histogram = torch.histc(draws[0], bins=50, min=0, max=1)
    assert (histogram / 4000 - 1).abs().max() < 0.08
    assert (torch.corrcoef(draws) - torch.eye(3)).abs().max() < 0.01


def test_the_bits_are_those_of_splitmix64():
    """Another way: the same arithmetic in Python's unbounded integers."""
    mask = (1 << 64) - 1

    def mixed(bits: int) -> int:
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & mask
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & mask
        return bits ^ (bits >> 31)

    key, golden = key_of(7, "x"), 0x9E3779B97F4A7C15
    for sample in (0, 1, -5, 2**62 + 12345):
        bits = mixed((sample + golden) & mask)
        bits = mixed((mixed(bits ^ (key & mask)) + golden) & mask)
        assert int(hash_bits(torch.tensor([sample]), key)) & mask == bits


def test_one_id_in_plain_integers_draws_what_the_tensor_draws():
    ids = [0, 1, -1, -(2**63), 2**62 + 12345, 77]
    keys = (key_of(3, "caption"), 5, -9)
    assert [uniform_of(value, *keys) for value in ids] == uniform(torch.tensor(ids), *keys).tolist()
    assert [uniform_of(value) for value in ids] == uniform(torch.tensor(ids)).tolist()
