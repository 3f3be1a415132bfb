"""What every toy that lists its outcomes must do, whichever it is; then what only one of them can get wrong.

Sums of float64 over a few hundred outcomes are compared to 1e-12. Finite differences are central with h = 1e-5: their error, h^2 times a third
derivative plus rounding over h, is below 1e-8 for objectives of the order of one."""

import itertools
from collections import defaultdict

import pytest
import torch

from offpolicy_rl.core import call, catalogue
from offpolicy_rl.lab.curve import curve
from offpolicy_rl.lab.exact import draws_of, exact, number_of_draws
from offpolicy_rl.ratios.importance import sequence_ratio, token_ratio
from offpolicy_rl.reinforce.reinforce import reinforce_loss
from offpolicy_rl.toys import toy as behaviours
from offpolicy_rl.toys.bandit import Bandit
from offpolicy_rl.toys.lqr import LQR
from offpolicy_rl.toys.mdp import Chain, Grid, tabular_mdp
from offpolicy_rl.toys.mixture2d import BumpReward, LinearReward, Mixture2D, tilted, variance_preserving
from offpolicy_rl.toys.pairs import PairTree, bradley_terry, bradley_terry_reward, circle
from offpolicy_rl.toys.tree import ChecksumTree, TokenTree
from offpolicy_rl.toys.turns import TurnTree

MAKERS = {
    "bandit": lambda: Bandit(scale=1.0),
    "noisy contextual bandit": lambda: Bandit(contexts=3, arms=3, noise=0.7, hidden=4),
    "token tree": lambda: TokenTree(3, 3),
    "with end token": lambda: TokenTree(3, 3, end_token=True, prompts=2),
    "checksum": lambda: ChecksumTree(3, 3),
    "turns": lambda: TurnTree(),
    "turns with rewards": lambda: TurnTree(3, 1, 3, 2, dense=True, prompts=2, hidden=5),
    "transitive pairs": lambda: PairTree(vocab=2, length=2, prompts=2),
    "cyclic pairs": lambda: PairTree(circle),
    "chain": lambda: Chain(),
    "slippery chain": lambda: Chain(4, 4, 0.2),
    "grid": lambda: Grid(3, 4),
    "slippery grid": lambda: Grid(2, 3, 0.1, cost=0.05, hidden=4),
}
BEHAVIOURS = {
    "stale": lambda t: behaviours.stale(t, 3),
    "temperature": lambda t: behaviours.temperature(t, 1.7),
    "mixture": lambda t: behaviours.mixture(t, 0.3),
    "noisy": lambda t: behaviours.noisy(t, 0.5),
    "quantised": lambda t: behaviours.quantised(t, 0.5),
    "another": lambda t: behaviours.another(t, 9),
    "expert": lambda t: behaviours.expert(t, 0.5),
}
each_toy = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
each_behaviour = pytest.mark.parametrize("behave", BEHAVIOURS.values(), ids=BEHAVIOURS)


def scores(toy):
    "Gradient (n, t, parameters) of each token's log-probability."
    return toy.jacobian()[toy.node, toy.token] * toy.mask[..., None]


@each_toy
def test_probabilities_sum_to_one_and_the_objective_is_the_sum(make):
    toy = make()
    table = toy.table()
    assert abs(toy.prob(table).sum() - 1) < 1e-12 and (toy.prob(table) > 0).all()
    assert abs(toy.objective() - sum(float(p) * float(r) for p, r in zip(toy.prob(table), toy.reward))) < 1e-12
    for x, d in enumerate(toy.prompt_prob): assert abs(toy.prob(table)[toy.prompt == x].sum() - d) < 1e-12


@each_toy
def test_no_outcome_is_listed_twice(make):
    toy = make()
    rows = zip(toy.prompt.tolist(), *(map(tuple, x.tolist()) for x in (toy.token, toy.node, toy.mask, toy.reward_t)))
    assert len(set(rows)) == len(toy)


@each_toy
def test_a_reward_without_a_time_comes_with_the_last_token_of_the_policy(make):
    toy = make()
    late = toy.with_reward(toy.reward)
    for row in range(len(late)):
        last = max(t for t in range(toy.token.shape[1]) if toy.mask[row, t])
        assert late.reward_t[row].tolist() == [float(late.reward[row]) if t == last else 0.0 for t in range(toy.token.shape[1])]
    assert (late.gradient() - toy.gradient()).abs().max() < 1e-12


@each_toy
def test_gradient_three_ways(make):
    toy = make()
    table, gradient, h = toy.table(), toy.gradient(), 1e-5
    theorem = torch.einsum("n,nt,ntp->p", toy.prob(table), toy.q_value(table), scores(toy))
    with_baseline = torch.einsum("n,nt,ntp->p", toy.prob(table), toy.q_value(table) - toy.value(table), scores(toy))
    to_go = torch.einsum("n,nt,ntp->p", toy.prob(table), toy.reward_to_go(), scores(toy))
    for other in (theorem, with_baseline, to_go): assert (other - gradient).abs().max() < 1e-12
    step = h * torch.eye(toy.policy.size, dtype=torch.float64)
    numeric = torch.stack([(toy.objective(toy.theta + e) - toy.objective(toy.theta - e)) / (2 * h) for e in step])
    assert (numeric - gradient).abs().max() < 1e-8


@each_toy
def test_values_are_brute_force_conditional_means(make):
    toy = make()
    table = toy.mu
    prob, weight, gain = toy.prob(table).tolist(), defaultdict(float), defaultdict(float)
    tokens, nodes, mask, paid = (x.tolist() for x in (toy.token, toy.node, toy.mask, toy.reward_t))
    for row, t in itertools.product(range(len(toy)), range(toy.token.shape[1])):
        if not mask[row][t]: continue
        for key in ((nodes[row][t], t), (nodes[row][t], t, tokens[row][t])):
            weight[key] += prob[row]
            gain[key] += prob[row] * sum(paid[row][t:])
    value, q = toy.value(table), toy.q_value(table)
    for row, t in itertools.product(range(len(toy)), range(toy.token.shape[1])):
        if not mask[row][t]:
            assert value[row, t] == 0 and q[row, t] == 0
            continue
        here, taken = (nodes[row][t], t), (nodes[row][t], t, tokens[row][t])
        assert abs(value[row, t] - gain[here] / weight[here]) < 1e-12 and abs(q[row, t] - gain[taken] / weight[taken]) < 1e-12


@each_toy
def test_the_batch_is_of_the_vocabulary_and_feeds_the_catalogue(make):
    toy = behaviours.noisy(make(), 0.3)
    batch = toy.batch()
    assert torch.equal(batch["reward_t"].sum(-1), toy.reward_t.sum(-1)) and (batch["reward_t"].sum(-1) - batch["reward"]).abs().max() < 1e-12
    assert batch["turn"].shape == batch["mask"].shape and not batch["turn"].is_floating_point()
    assert all(x.dtype == torch.float64 for x in batch.values() if x.is_floating_point())
    fed = 0
    for row in catalogue():
        if row.kind not in ("ratio", "loss") or not set(row.inputs) <= batch.keys(): continue
        made = call(row.fn, batch)
        assert torch.isfinite(made[0] if row.kind == "loss" else made).all(), row.name
        fed += 1
    assert fed >= 4


@each_behaviour
@each_toy
def test_every_behaviour_is_a_policy_with_which_full_weights_are_unbiased(make, behave):
    toy = behave(make())
    assert (toy.mu.exp().sum(-1) - 1).abs().max() < 1e-12 and torch.isfinite(toy.mu).all()
    assert abs(toy.prob(toy.mu).sum() - 1) < 1e-12 and 0 < toy.ess <= 1 + 1e-12 and toy.kl >= -1e-12
    assert exact(sequence_ratio, toy).bias < 1e-12


@each_toy
def test_without_weights_the_stale_gradient_is_biased_wherever_more_than_one_token_counts(make):
    toy = behaviours.another(make(), 9)
    if (toy.mask.sum(-1) > 1).any(): assert exact(token_ratio, toy).relative_bias > 1e-6


@each_toy
def test_groups_are_enumerated_and_sampled_alike(make):
    toy = behaviours.mixture(make(), 0.2)
    if number_of_draws(toy, 2) < 20_000: assert abs(draws_of(toy, 2)[1].sum() - 1) < 1e-12
    rows = toy.sample(20_000, torch.Generator().manual_seed(0), 3)
    assert (toy.prompt[rows] == toy.prompt[rows[:, :1]]).all()
    seen = torch.bincount(rows[:, 1], minlength=len(toy)) / len(rows)
    expected = toy.prob(toy.mu)
    # five standard errors, on a few hundred outcomes: by chance alone once in a thousand seeds
    assert ((seen - expected).abs() < 5 * (expected * (1 - expected) / len(rows)).sqrt() + 2 / len(rows)).all()


@each_toy
def test_it_learns(make):
    "Exact on-policy gradient steps raise the objective, sampled ones run; both through the lab that knows no toy by name."
    toy = make()
    once = curve(reinforce_loss, toy, expected=True, group_size=1, updates=2, lr=0.05)
    assert once.objective[0, -1] > once.objective[0, 0]
    noisy = curve(reinforce_loss, toy, staleness=2, updates=4, seeds=(0, 1))
    for quantity in (noisy.objective, noisy.entropy, noisy.kl, noisy.ess): assert quantity.shape == (2, 5) and torch.isfinite(quantity).all()


@each_toy
def test_the_same_seed_is_the_same_toy(make):
    one, two = make(), make()
    assert torch.equal(one.theta, two.theta) and torch.equal(one.reward, two.reward) and torch.equal(one.chance, two.chance)


def test_environment_tokens_stand_between_the_turns():
    toy = TurnTree(3, 2, 2, 2, dense=True)
    assert toy.mask[0].tolist() == [1, 1, 0, 1, 1, 0, 1, 1] and toy.turn[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert (toy.reward_t[:, [0, 2, 3, 5, 6]] == 0).all() and (toy.reward_t[:, [1, 4, 7]] != 0).all()
    assert (TurnTree().reward_t[:, :-1] == 0).all()


def test_a_given_reward_and_reply_are_used():
    sure = TurnTree(2, 1, 2, 2, reply=lambda prompt, said: [0.0, 1.0], reward=lambda prompt, said: sum(said))
    assert len(sure) == 4 and (sure.token[:, 1] == 1).all() and (sure.chance == 1).all()
    assert torch.equal(sure.reward, (sure.token[:, 0] + 1 + sure.token[:, 2]).double())


def test_win_rates_and_nash():
    toy = behaviours.another(PairTree([[.5, .8, .4], [.2, .5, .9], [.6, .1, .5]]), 4)
    policy, value = toy.nash()
    assert (policy - torch.tensor([[.5, .125, .375]], dtype=torch.float64)).abs().max() < 1e-12 and abs(value[0] - 0.5) < 1e-12
    assert abs(toy.win_rate(toy.table(), toy.mu) - toy.against(toy.mu).objective()) < 1e-12
    pairs = toy.pairs()
    assert abs((pairs.prob * pairs.label).sum() - 0.5) < 1e-12
    for n in (3, 5, 7): assert (PairTree(circle, vocab=n).nash()[0] - 1 / n).abs().max() < 1e-12
    reward = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (bradley_terry_reward(bradley_terry(reward)) - (reward - reward.mean(-1, keepdim=True))).abs().max() < 1e-12
    with pytest.raises(ValueError, match="reward explains"): PairTree(circle).bt_reward()


def test_dynamic_programming_agrees_with_the_list_of_trajectories():
    for toy in (Chain(5, 6), Chain(3, 6, 0.3), Grid(3, 4, 0.2, cost=0.1), Grid(2, 5)):
        for table in (toy.table(), behaviours.another(toy, 3).mu):
            steps, live = torch.arange(toy.horizon).expand_as(toy.node), toy.mask.bool()
            assert (toy.value(table) - toy.state_value(table)[steps, toy.node])[live].abs().max() < 1e-12
            assert (toy.q_value(table) - toy.action_value(table)[steps, toy.node, toy.token])[live].abs().max() < 1e-12
            visits = torch.zeros(toy.horizon, len(toy.start), dtype=torch.float64)
            visits.index_put_((steps, toy.node), toy.prob(table)[:, None] * toy.mask, accumulate=True)
            assert (visits - toy.occupancy(table)).abs().max() < 1e-12


def test_value_of_a_state_depends_on_the_time_left():
    "Two places, a coin for a policy: at the right end half of the steps pay 1 and stay, the others lead to the left end."
    toy = Chain(2, 2, near=0.0, scale=0.0)
    value = toy.state_value(toy.table())
    assert (value - torch.tensor([[.25, .75], [0, .5], [0, 0]], dtype=torch.float64)).abs().max() < 1e-12


def test_lqr_optimum_and_monte_carlo():
    world = LQR(K=[[0.5, 0.8]], horizon=6)
    assert world.at(world.optimal()).gradient().abs().max() < 1e-12 * world.gradient().abs().max()
    batch = world.with_behaviour([[0.4, 0.6]], 0.6).rollouts(20_000, torch.Generator().manual_seed(0))
    assert (batch["logp"] - world.logp(world.K, world.sigma, batch["state"], batch["action"])).abs().max() == 0
    each = torch.einsum("bt,btij->bij", sequence_ratio(batch["logp"], batch["logp_mu"], batch["mask"]) * batch["adv"], world.score(batch))
    assert ((each.mean(0) - world.gradient()).abs() < 4 * each.std(0) / 20_000 ** 0.5).all()
    on_policy = world.rollouts(20_000, torch.Generator().manual_seed(1))
    earned = on_policy["reward"]
    assert abs(earned.mean() - world.objective()) < 4 * earned.std() / 20_000 ** 0.5
    assert (on_policy["adv"].mean(0).abs() < 4 * on_policy["adv"].std(0) / 20_000 ** 0.5).all()      # the value is exact at every step


def test_mixture_tilts_and_noise_levels():
    mix = Mixture2D(3, spread=0.5)
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (0.0, 0.2, 1.0):
        alpha, sigma = variance_preserving(t)
        noisy = mix.noised(alpha, sigma)
        assert (torch.func.vmap(torch.func.grad(noisy.log_density))(x) - noisy.score(x)).abs().max() < 1e-11
        again = noisy.noised(0.5, 0.1).log_density(x) - mix.noised(0.5 * alpha, (0.25 * sigma ** 2 + 0.01) ** 0.5).log_density(x)
        assert again.abs().max() < 1e-11
    for reward in (LinearReward((1.0, 2.0)), BumpReward((1.0, 0.0), 0.7)):
        best, log_z = tilted(mix, reward, 0.5)
        assert abs(best.weight.sum() - 1) < 1e-12
        assert (mix.log_density(x) + 2 * reward(x) - log_z - best.log_density(x)).abs().max() < 1e-11


BAD = {
    "contexts": (lambda: Bandit(contexts=0), "contexts"), "noise": (lambda: Bandit(noise=-1), "noise"), "arms": (lambda: Bandit([1.0]), "two arms"),
    "hidden": (lambda: TokenTree(hidden=0), "hidden"), "reward": (lambda: Bandit([1.0, float("nan")]), "reward"),
    "length": (lambda: TokenTree(length=0), "length"),
    "turns": (lambda: TurnTree(turns=0), "turns"), "replies": (lambda: TurnTree(replies=3), "replies"),
    "reply": (lambda: TurnTree(reply=lambda x, h: [0.5, 0.2]), "reply"), "too many replies": (lambda: TurnTree(reply=lambda x, h: [0.2] * 5), "reply"),
    "preference shape": (lambda: PairTree(torch.full((2, 2), 0.5)), "preference"), "preference sum": (lambda: PairTree(torch.full((3, 3), 0.4)), "preference"),
    "preference range": (lambda: PairTree(2 * circle() - 0.5 + 0.5 * (circle() > 0.7).double()), "preference"), "circle": (lambda: circle(4), "n: "),
    "strength": (lambda: circle(3, 0.7), "strength"),
    "states": (lambda: Chain(1), "states"), "slip": (lambda: Chain(slip=1.5), "slip"), "horizon": (lambda: Grid(horizon=0), "horizon"),
    "too many": (lambda: Chain(5, 30), "trajectories"), "size": (lambda: Grid(1), "size"),
    "transition": (lambda: tabular_mdp(torch.ones(2, 2, 2), torch.zeros(2, 2), torch.tensor([1., 0.]), 2), "transition"),
    "start": (lambda: tabular_mdp(torch.eye(2)[:, None], torch.zeros(2, 1), torch.tensor([1., 1.]), 2), "start"),
    "terminal": (lambda: tabular_mdp(torch.eye(2)[:, None], torch.zeros(2, 1), torch.tensor([1., 0.]), 2, terminal=[2]), "terminal"),
    "terminal start": (lambda: tabular_mdp(torch.eye(2)[:, None], torch.zeros(2, 1), torch.tensor([1., 0.]), 2, terminal=[0]), "start"),
    "step reward": (lambda: tabular_mdp(torch.eye(2)[:, None], torch.zeros(3, 1), torch.tensor([1., 0.]), 2), "reward"),
    "A": (lambda: LQR([[1.0, 0.0]]), "A: "), "B": (lambda: LQR(B=[[1.0]]), "B: "), "R": (lambda: LQR(R=[[0.0]]), "R: "), "K": (lambda: LQR(K=[1.0]), "K: "),
    "sigma": (lambda: LQR(sigma=0), "sigma"), "behaviour": (lambda: LQR().with_behaviour([[0.0, 0.0]], -1), "sigma"),
    "modes": (lambda: Mixture2D(0), "modes"), "spread": (lambda: Mixture2D(spread=0), "spread"), "weight": (lambda: Mixture2D(2, weight=[1, -1]), "weight"),
    "covariance": (lambda: Mixture2D(1, covariance=[[[1, 2], [2, 1]]]), "covariance"), "time": (lambda: variance_preserving(2.0), "t: "),
    "beta": (lambda: tilted(Mixture2D(), LinearReward((1, 0)), 0.0), "beta"), "width": (lambda: BumpReward((0, 0), 0.0), "width"),
}


@pytest.mark.parametrize(("make", "name"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_by_name(make, name):
    with pytest.raises(ValueError, match=name): make()
