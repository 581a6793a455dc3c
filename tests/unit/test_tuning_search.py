"""Which settings are tried, on machines whose best settings are known."""

from __future__ import annotations

from dataclasses import replace

from batchgen.job.tuned import with_settings
from batchgen.tuning.search import Search
from batchgen.tuning.trial import Measure, Trial


class Machine:
    """A GPU in arithmetic: steps of some ms plus some a row, and a KV cache for so many rows."""

    def __init__(self, make_job, *, fits=10_000, dies_at=None, memory=0.92, **own):
        self.job = make_job(model={"name": "m", "backend": "vllm"})
        self.job = with_settings(self.job, own)
        self.fits, self.dies_at, self.memory = fits, dies_at or {}, memory
        self.tokens_per_row_step = 1.0
        self.gains = {}
        self.cached_share = 0.5
        self.window = None

    def search(self, **kwargs):
        """Run a search to its end; return it."""
        search = Search(self.job, **{"is_gpu": True, **kwargs})
        for settings in search.candidates():
            assert len(search.trials) < 30
            search.note(self.trial(settings))
        return search

    def trial(self, settings):
        job = with_settings(self.job, settings)
        of = {
            "max_num_seqs": job.model.max_num_seqs or 256,
            "max_num_batched_tokens": job.model.engine.get("max_num_batched_tokens", 8192),
            "gpu_memory_utilization": job.model.gpu_memory_utilization or self.memory,
        }
        for name, value in self.dies_at.items():
            if of[name] >= value:
                return Trial(settings, failure="CUDA out of memory")
        seqs, window = of["max_num_seqs"], job.run.max_in_flight or 2 * of["max_num_seqs"]
        fits = self.fits * of["gpu_memory_utilization"] / self.memory
        running = int(min(seqs, fits, window))
        speed = running / (0.02 + running * 2e-5)
        for name, value in settings.items():
            speed *= self.gains.get((name, value), 1.0)
        preempted = 0.3 if seqs > 1.5 * fits else 0.0
        return Trial(
            settings,
            Measure(
                seconds=60,
                rows_per_s=10,
                prompt_tokens_per_s=0,
                output_tokens_per_s=speed * (1 - preempted / 3),
                error=0.005,
                num_preemptions=int(600 * preempted),
                preemptions_per_row=preempted,
                kv_cache_usage=min(1.0, running / fits),
                num_running=running,
                num_waiting=window - running,
                max_num_seqs=seqs,
                max_num_batched_tokens=of["max_num_batched_tokens"],
                tokens_per_step=running * self.tokens_per_row_step,
                cached_share=self.cached_share,
            ),
        )


def tried(search, name):
    return [trial.settings[name] for trial in search.trials if name in trial.settings]


def test_more_rows_at_once_as_long_as_it_pays(make_job):
    search = Machine(make_job).search()
    # 256 rows: 10,191 tokens/s; 2,048: 33,606; 4,096: 40,188; the next would be beyond the most.
    assert search.best.settings == {"max_num_seqs": 4096}
    assert search.trials[0].settings == {}


def test_the_kv_cache_bounds_what_is_tried(make_job):
    search = Machine(make_job, fits=700).search()
    assert search.best.settings["max_num_seqs"] == 624  # 90 % of what fits.
    assert max(tried(search, "max_num_seqs")) < 700
    assert not any(trial.measure.num_preemptions for trial in search.trials)


def test_preemptions_are_cured_by_fewer_rows_at_once(make_job):
    machine = Machine(make_job, fits=100, max_num_seqs=512)
    assert machine.trial({}).measure.num_preemptions
    best = machine.search().best
    assert best.settings["max_num_seqs"] < 100
    assert best.measure.num_preemptions == 0


def test_memory_is_only_asked_for_where_it_is_what_binds(make_job):
    assert tried(Machine(make_job).search(), "gpu_memory_utilization") == []
    short = Machine(make_job, fits=200)
    assert tried(short.search(), "gpu_memory_utilization")[0] == 0.95
    assert tried(short.search(most_memory=0.94), "gpu_memory_utilization")[0] == 0.94
    assert tried(short.search(most_memory=0.9), "gpu_memory_utilization") == []
    assert tried(short.search(is_gpu=False), "gpu_memory_utilization") == []


def test_nothing_within_reach_of_an_out_of_memory_is_chosen(make_job):
    search = Machine(make_job, dies_at={"max_num_seqs": 1024}).search()
    assert [trial.settings for trial in search.trials if trial.failure] == [{"max_num_seqs": 1024}]
    assert search.best.settings == {"max_num_seqs": 512}
    # What memory is spared by dying later does not make it come nearer.
    assert all(value <= 1024 for value in tried(search, "max_num_seqs"))
    search = Machine(make_job, fits=250, dies_at={"gpu_memory_utilization": 0.95}).search()
    assert "gpu_memory_utilization" not in search.best.settings


def test_what_was_deadly_is_kept_at_a_distance(make_job):
    search = Search(make_job(), is_gpu=True)
    own = Machine(make_job).trial({})
    for trial in (
        own,
        Trial({"max_num_seqs": 1024}, failure="CUDA out of memory"),
        Trial({"gpu_memory_utilization": 0.95}, failure="CUDA out of memory"),
        Trial({"enable_prefix_caching": False}, failure="refused"),
    ):
        search.note(trial)
    for name, value in (("max_num_seqs", 513), ("gpu_memory_utilization", 0.93)):
        assert search._is_risky({name: value})
    for name, value in (
        ("max_num_seqs", 512),
        ("gpu_memory_utilization", 0.92),
        ("max_num_batched_tokens", 10**6),
        ("enable_prefix_caching", True),
    ):
        assert not search._is_risky({name: value})


def test_a_move_that_may_not_be_made_ends_its_way(make_job):
    machine = Machine(make_job, fits=480, max_num_seqs=512, gpu_memory_utilization=0.5)
    machine.memory = 0.5
    search = Search(machine.job, is_gpu=True)
    for settings in search.candidates():
        if settings == {}:
            search.note(machine.trial(settings))
            search.note(Trial({"max_num_seqs": 800}, failure="CUDA out of memory"))
            continue
        assert settings.get("max_num_seqs", 0) <= 400
        assert len(search.trials) < 20
        search.note(machine.trial(settings))
    assert search.best.settings == {"gpu_memory_utilization": 0.95}


def test_steps_with_room_left_need_no_larger_budget(make_job):
    machine = Machine(make_job, max_num_seqs=4096)
    assert tried(machine.search(), "max_num_batched_tokens") == [16384]
    machine.tokens_per_row_step = 0.1
    assert tried(machine.search(), "max_num_batched_tokens") == []


def test_a_larger_budget_is_raised_while_it_pays(make_job):
    machine = Machine(make_job, fits=300, max_num_seqs=256)
    machine.tokens_per_row_step = 100
    machine.gains = {
        ("max_num_batched_tokens", 16384): 1.1,
        ("max_num_batched_tokens", 32768): 1.1,
    }
    search = machine.search()
    assert tried(search, "max_num_batched_tokens")[:2] == [16384, 32768]
    assert search.best.settings["max_num_batched_tokens"] == 16384


def test_prefix_caching_stays_where_it_serves(make_job):
    machine = Machine(make_job, max_num_seqs=4096)
    assert tried(machine.search(), "enable_prefix_caching") == []
    machine.cached_share = 0.0
    machine.gains = {("enable_prefix_caching", False): 1.05}
    assert machine.search().best.settings == {"enable_prefix_caching": False}
    off = Machine(make_job, max_num_seqs=4096, enable_prefix_caching=False)
    off.cached_share = 0.0
    assert tried(off.search(), "enable_prefix_caching") == []


def test_a_window_that_starves_the_engine_is_widened_first(make_job):
    search = Machine(make_job, max_in_flight=32).search()
    assert search.trials[1].settings == {"max_in_flight": 512}
    assert search.best.settings["max_num_seqs"] == 4096
    assert search.best.settings["max_in_flight"] == 8192  # Wide enough for what runs at once.


def test_gains_within_the_noise_are_none(make_job):
    machine = Machine(make_job, max_num_seqs=4096)
    machine.cached_share = 0.0
    machine.gains = {("enable_prefix_caching", False): 1.015}
    assert machine.search().best.settings == {}


def test_the_noisier_two_trials_are_the_more_one_has_to_be_better(make_job):
    machine = Machine(make_job)
    own, better = machine.trial({}), machine.trial({"enable_prefix_caching": False})

    def is_best(gain, error):
        search = Search(machine.job, is_gpu=True)
        search.note(own)
        speed = own.measure.speed * gain
        found = replace(better.measure, output_tokens_per_s=speed, error=error)
        search.note(replace(better, measure=found))
        return search.best is not own

    assert is_best(1.03, 0.005)
    assert not is_best(1.03, 0.03)
    assert is_best(1.07, 0.03)
    assert is_best(1.11, 1.0)


def test_without_a_first_measure_nothing_is_tried(make_job):
    machine = Machine(make_job, dies_at={"max_num_seqs": 1})
    search = machine.search()
    assert len(search.trials) == 1
    assert search.best is search.own


def test_the_echo_engine_has_two_settings(make_job):
    machine = Machine(make_job)
    machine.cached_share = 0.0
    machine.job = make_job(model={"backend": "echo"})
    names = {name for trial in machine.search(is_gpu=False).trials for name in trial.settings}
    assert names == {"max_num_seqs"}
