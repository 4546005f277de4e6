"""The cumulative ratio's identities, by listing every sequence of a tiny policy (vocabulary 3, 4 steps).

With one terminal reward R for all tokens, CTPO's gradient is *not* that of E_pi[R]. What holds exactly is
    E_mu[sum_t rho_t R grad log pi_t] = sum_t E_{y<=t ~ pi}[grad log pi_t Q^mu(y<=t)],
where Q^mu(y<=t) is the mean of R when the *sampler* writes the rest.
"""

import pytest
import torch
from torch import Tensor

from rltk.algorithms import TokenBatch, build_objective
from tests.unit.algorithms.tables import Table, make_batch

POLICY = Table(0, steps=4, scale=0.7)
SAMPLER = POLICY.near(1, 0.5)
SEQUENCES = POLICY.sequences()
REWARD = torch.randn(len(SEQUENCES), generator=torch.Generator().manual_seed(2)).double()
MU = SAMPLER.logprobs(SEQUENCES)
OPEN = {"clip_low": 60.0, "clip_high": 60.0, "dual_clip": None, "aggregation": "token-sum"}  # no clipping


def rho(new: Tensor, mu: Tensor) -> Tensor:
    """rho_t as the objective uses it, `[N, T]`: with A = 1 at token t alone, the unclipped loss is -rho_t."""
    objective = build_objective("ctpo", **OPEN)
    columns = []
    for t in range(mu.shape[1]):
        only = torch.zeros_like(mu)
        only[:, t] = 1.0
        columns.append(-objective.token_loss(make_batch(new, mu, only))[0][:, t])
    return torch.stack(columns, dim=1).detach()


RHO = rho(POLICY.logprobs(SEQUENCES), MU)
WEIGHT = MU.sum(dim=1).exp()  # probability of each sequence under the sampler


def test_rho_has_mean_one_under_the_sampler_at_every_position():
    torch.testing.assert_close((WEIGHT[:, None] * RHO).sum(dim=0), torch.ones(4).double())


def test_its_variance_grows_with_position_and_ends_at_the_sequence_ratio():
    variance = (WEIGHT[:, None] * (RHO - 1) ** 2).sum(dim=0)
    assert (variance.diff() > 0).all() and variance[0] > 0
    full = (POLICY.logprobs(SEQUENCES) - MU).sum(dim=1).exp()
    torch.testing.assert_close(variance[-1], (WEIGHT * (full - 1) ** 2).sum())


def ctpo_gradient(reward: Tensor) -> Tensor:
    """E_mu[sum_t rho_t R grad log pi_t], through the objective: the advantage is R times the sequence's probability."""
    logits = POLICY.logits.clone().requires_grad_()
    batch = make_batch(POLICY.logprobs(SEQUENCES, logits), MU, reward * WEIGHT)
    loss, metrics = build_objective("ctpo", **OPEN).loss(batch)
    assert metrics["clip/share"] == 0
    return -torch.autograd.grad(loss, logits)[0]


def test_the_gradient_is_that_of_prefixes_valued_by_the_sampler():
    logits = POLICY.logits.clone().requires_grad_()
    new = POLICY.logprobs(SEQUENCES, logits)
    right = torch.zeros(())
    for t in range(4):
        prefix = (SEQUENCES[:, : t + 1] * 3 ** torch.arange(t + 1)).sum(dim=1)
        rest = MU[:, t + 1 :].sum(dim=1).exp()
        q = torch.zeros(3 ** (t + 1)).double().index_add(0, prefix, rest * REWARD)[prefix]
        # Summing pi(y<=t) mu(y>t) over whole sequences is summing pi(y<=t) over prefixes.
        probability = new.detach()[:, : t + 1].sum(dim=1).exp() * rest
        right = right + (probability * q * new[:, t]).sum()
    torch.testing.assert_close(ctpo_gradient(REWARD), torch.autograd.grad(right, logits)[0])


def outcome_gradient(reward: Tensor) -> Tensor:
    logits = POLICY.logits.clone().requires_grad_()
    expected = (POLICY.logprobs(SEQUENCES, logits).sum(dim=1).exp() * reward).sum()
    return torch.autograd.grad(expected, logits)[0]


def test_it_is_not_the_gradient_of_the_outcome_unless_the_reward_is_the_first_tokens():
    assert (ctpo_gradient(REWARD) - outcome_gradient(REWARD)).abs().max() > 1e-2
    # A reward that the first token settles: Q^mu = Q^pi at every prefix, so the two agree.
    settled = torch.tensor([1.0, -2.0, 0.5]).double()[SEQUENCES[:, 0]]
    torch.testing.assert_close(ctpo_gradient(settled), outcome_gradient(settled))


def test_the_token_ratio_is_biased_where_the_cumulative_one_is_not():
    """For a reward settled by the second token, GRPO's r_t (weighting no prefix) misses, CTPO's rho_t does not."""
    settled = torch.randn(9, generator=torch.Generator().manual_seed(3)).double()
    settled = settled[SEQUENCES[:, 0] * 3 + SEQUENCES[:, 1]]
    exact = outcome_gradient(settled)[1:4]  # the rows of the second token's logits
    logits = POLICY.logits.clone().requires_grad_()
    batch = make_batch(POLICY.logprobs(SEQUENCES, logits), MU, settled * WEIGHT)
    loss = build_objective("grpo", clip_low=1.0, clip_high=100.0, aggregation="token-sum").loss(batch)[0]
    grpo = -torch.autograd.grad(loss, logits)[0][1:4]
    torch.testing.assert_close(ctpo_gradient(settled)[1:4], exact)
    assert (grpo - exact).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["seq-mean-token-mean", "token-mean"])
def test_tool_tokens_leave_the_identity_as_it_is(how):
    """Two tool tokens after the second: the same gradient, aggregation included."""
    logits = POLICY.logits.clone().requires_grad_()
    new = POLICY.logprobs(SEQUENCES, logits)
    tool = torch.full((len(new), 2), -3.0).double()
    mask = torch.tensor([1, 1, 0, 0, 1, 1]).expand(len(new), -1)
    wide, wide_mu = (torch.cat([x[:, :2], tool, x[:, 2:]], dim=1) for x in (new, MU - 0.0))
    group = torch.zeros(len(new)).long()
    batch = TokenBatch(wide, wide_mu + 5 * (mask == 0), wide_mu, mask, REWARD * WEIGHT, group)
    options = {**OPEN, "aggregation": how}
    loss = build_objective("ctpo", **options).loss(batch)[0]
    plain = build_objective("ctpo", **options).loss(make_batch(new, MU, REWARD * WEIGHT))[0]
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, plain)))
