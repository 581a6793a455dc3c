"""The bugs that the proofs must find: exact text replacements, and the smallest proof for each."""

from __future__ import annotations

from dataclasses import dataclass

POWER = ("-m", "tests.torture.power", "--losses", "120", "--workers", "1")
PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
SWEEP = ("-m", "tests.torture.sweep", "--percent", "0", "--workers", "1")
NIGHTS = ("-m", "tests.torture.nights", "--worlds", "40", "--workers", "1")


@dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    """Old text, which must occur exactly once, and new text."""
    proof: tuple[str, ...]
    """Arguments of Python, to be run in the copy; must end with an error there, only there."""
    only: str = ""
    """Restricts a sweep, see `sweep`."""


KEEPING = "batchgen/pipeline/keeping.py"
STORAGE, LEDGER = "batchgen/storage/__init__.py", "batchgen/store/ledger.py"
SNAPSHOT, SHOWN = "batchgen/pipeline/publish.py", "batchgen/store/visible.py"
COMMIT_END = """            self._disk.unlink(self._temp)
            self._disk.sync_folder(self._final.parent)
"""
LINK = "                self._disk.link(self._temp, self._final)\n"

MUTANTS = (
    Mutant(
        "write in place, no temp file",
        STORAGE,
        (
            ("        self._temp = temp\n", "        self._temp = temp = final\n"),
            (LINK, "                pass\n"),
            (COMMIT_END, "            self._disk.sync_folder(self._final.parent)\n"),
        ),
        SWEEP,
        "new/kill before,new/kill after",
    ),
    Mutant(
        "no fsync of the file",
        STORAGE,
        (
            (
                "                self._disk.sync(self._file)\n",
                "                self._file.flush()\n",
            ),
        ),
        POWER,
    ),
    Mutant(
        "no fsync of the folder after a commit",
        STORAGE,
        ((COMMIT_END, "            self._disk.unlink(self._temp)\n"),),
        POWER,
    ),
    Mutant(
        "new folders are not made durable",
        STORAGE,
        (("                self._disk.sync_folder(path.parent)\n", ""),),
        POWER,
    ),
    Mutant(
        "what a dead run left is believed before it is durable",
        "batchgen/pipeline/decide.py",
        (
            ("    ledger.settle()\n    newest", "    newest"),
            ("    ledger.settle()\n    if manifest is not None:", "    if manifest is not None:"),
        ),
        ("-m", "tests.torture.power", "--losses", "1", "--workers", "2"),
    ),
    Mutant(
        "rename instead of link",
        STORAGE,
        ((LINK, LINK.replace("link", "rename")),),
        (*PYTEST, "tests/unit/test_storage.py"),
    ),
    Mutant(
        "no fence: every part that is listed is accepted",
        LEDGER,
        (
            (
                'names = [*claim["accepted"], *self._parts_of(number)]',
                'names = self.storage.list(f"{STATE}/parts")',
            ),
        ),
        (*PYTEST, "tests/unit/test_ledger.py"),
    ),
    Mutant(
        "no seal: what a worker writes after it was given up is accepted",
        LEDGER,
        (("            if epoch_of(seal) == epoch:\n", "            if not epoch:\n"),),
        (*PYTEST, "tests/unit/test_ledger.py"),
    ),
    Mutant(
        "resume by count",
        "batchgen/pipeline/rows.py",
        (
            (
                "plan.rows - durable.rows",
                "plan.rows - {n: type(r).until(len(r)) for n, r in durable.rows.items()}",
            ),
        ),
        SWEEP,
        "new/kill before",
    ),
    Mutant(
        "snapshot by plain listing of the parts",
        SNAPSHOT,
        (
            (
                "[(part.name, part.footer) for part in durable.parts],",
                '[(name, ledger._footer(name, plan)) for name in ledger.storage.list(f"{STATE}/parts")],',  # noqa: E501
            ),
        ),
        (*PYTEST, "tests/e2e/test_late_runs.py"),
    ),
    Mutant(
        "no read-back after a doubted put",
        STORAGE,
        (("return pending.commit() or self.read(name) == data", "return pending.commit()"),),
        SWEEP,
        "new/EIO,new/EIO after",
    ),
    Mutant(
        "a dead engine is spoken to again",
        "batchgen/engine/supervised.py",
        (
            (
                "        self._let_go()\n        self.is_admitting = False\n",
                "        self.is_admitting = False\n",
            ),
        ),
        (*PYTEST, "tests/unit/test_engine_supervised.py"),
    ),
    Mutant(
        "an answer that comes twice is handed out twice",
        "batchgen/engine/supervised.py",
        (("        pop = life.held.pop\n", "        pop = life.held.get\n"),),
        (*PYTEST, "tests/unit/test_engine_supervised.py"),
    ),
    Mutant(
        "published without balanced books",
        LEDGER,
        (("if imbalance := manifest.imbalance():", "if imbalance := None:"),),
        (*PYTEST, "tests/unit/test_ledger.py"),
    ),
    Mutant(
        "parts removed before the manifest",
        SNAPSHOT,
        (
            (
                "    return ledger.put_manifest(manifest, plan.kept_of)\n",
                "    for name in ledger.storage.list(f'{STATE}/parts'):\n"
                "        ledger.storage.remove(name)\n"
                "    return ledger.put_manifest(manifest, plan.kept_of)\n",
            ),
        ),
        SWEEP,
        "new/kill before",
    ),
    Mutant(
        "a frozen run that wakes shows its old snapshot for good",
        SHOWN,
        (
            (
                "        manifest = ledger.latest_manifest() or manifest\n        steps",
                "        steps",
            ),
            (
                "        newest = ledger.latest_manifest() or manifest\n        if is_through",
                "        newest = manifest\n        if is_through",
            ),
        ),
        (*PYTEST, "tests/e2e/test_late_runs.py"),
    ),
    Mutant(
        "a published file that was written over is believed without a look",
        SHOWN,
        (("if wrong is None and mark != noted.get(name):", "if wrong is None and not mark:"),),
        (*PYTEST, "tests/e2e/test_damage.py"),
    ),
    Mutant(
        "a line is taken for the one that was at its place, whatever it says",
        "batchgen/store/matching.py",
        (
            (
                'left_on=["old", "a", "b"], right_on=["row", "a", "b"]',
                'left_on=["old"], right_on=["row"]',
            ),
        ),
        NIGHTS,
    ),
    Mutant(
        "a line is known by its beginning",
        "batchgen/source/text.py",
        (
            (
                "hashlib.sha256(line).digest()[:DIGEST_BYTES]",
                "hashlib.sha256(line[:25]).digest()[:DIGEST_BYTES]",
            ),
        ),
        NIGHTS,
    ),
    Mutant(
        "an answer is known by the beginning of its key",
        "batchgen/store/reuse.py",
        (('is_same = found == rows["key"]', "is_same = found == found"),),
        NIGHTS,
    ),
    Mutant(
        "a copied answer stands beside another row's columns",
        "batchgen/pipeline/rows.py",
        (
            (
                "request.ordinal, batch.carried, request.index)",
                "request.ordinal, batch.carried, 0)",
            ),
        ),
        NIGHTS,
    ),
    Mutant(
        "an error that names a line is taken over although the line has moved",
        "batchgen/store/matching.py",
        (('is_wanted = is_wanted | pl.col("has_key") | stays', "is_wanted = is_wanted | True"),),
        NIGHTS,
    ),
    Mutant(
        "what an unfinished night would have taken over is forgotten",
        "batchgen/pipeline/decide.py",
        (("(Base(plan.number, parts), *plan.bases)", "(Base(plan.number, parts),)"),),
        NIGHTS,
    ),
    Mutant(
        "verify skips the parts of an unfinished second night",
        "batchgen/store/verify.py",
        (
            (
                "    if manifest is None or manifest.number != plan.number:\n",
                "    if manifest is None:\n",
            ),
        ),
        (*PYTEST, "tests/e2e/test_verify.py", "-k", "second_night"),
    ),
    Mutant(
        "verify never reports a row that is held twice",
        "batchgen/store/result_files.py",
        (("    if seen.num_rows != num_rows:\n", "    if seen.num_rows > num_rows:\n"),),
        (*PYTEST, "tests/e2e/test_verify.py", "-k", "row_twice"),
    ),
    Mutant(
        "max_shrink leaves out the last snapshot's error rows",
        SNAPSHOT,
        (("num_last = last.num_ok + last.num_errors if", "num_last = last.num_ok if"),),
        (*PYTEST, "tests/e2e/test_gate.py", "-k", "shrunk_night"),
    ),
    Mutant(
        "the column that names a row's adapter is no part of the recipe",
        "batchgen/job/recipe.py",
        (('*("lora_column", "reasoning_parser",', '*("reasoning_parser",'),),
        (*PYTEST, "tests/unit/test_recipe.py"),
    ),
    Mutant(
        "pruning has no floor: the newest claim goes too",
        "batchgen/store/prune.py",
        (('_numbered(storage, "epochs")[: -keep.num]', '_numbered(storage, "epochs")'),),
        (*PYTEST, "tests/unit/test_prune.py"),
    ),
    Mutant(
        "only the next claim fences a run, which may be pruned",
        LEDGER,
        (
            (
                "        if self.latest_epoch_number() > epoch.number:\n",
                "        after = numbered('epochs', epoch.number + 1)\n"
                "        if self.storage.read(after) is not None:\n",
            ),
        ),
        (*PYTEST, "tests/unit/test_prune.py"),
    ),
    Mutant(
        "nothing keeps readers away while names are switched",
        SHOWN,
        (
            ("        storage.replace(SWITCHING, marker)\n", ""),
            ("    is_ours = storage.read(SWITCHING) == marker\n", "    is_ours = bool(marker)\n"),
        ),
        (*PYTEST, "tests/unit/test_switching.py"),
    ),
    Mutant(
        "a plan that has only error rows counts as nothing",
        "batchgen/pipeline/decide.py",
        (("footer.num_results > num_unanswered", "footer.num_ok > num_unanswered"),),
        (*PYTEST, "tests/unit/test_nights_decide.py"),
    ),
    Mutant(
        "a seal that is asked for again answers by what is listed now",
        LEDGER,
        (('        return list(self._read_json(name)["parts"])\n', "        return mine\n"),),
        (*PYTEST, "tests/unit/test_ledger.py"),
    ),
    Mutant(
        "nobody looks at the input right before publishing",
        SNAPSHOT,
        (("        check_unchanged(segment)\n", "        assert segment\n"),),
        (*PYTEST, "tests/unit/test_nights_decide.py"),
    ),
    Mutant(
        "a file is kept though a row in it changed",
        KEEPING,
        (("if at < 0 or start + num_rows > runs[at].old + runs[at].length:", "if at < 0:"),),
        NIGHTS,
    ),
    Mutant(
        "a file is kept though its errors name other lines",
        KEEPING,
        (("if not file.num_errors else still if", "if not file.num_errors else runs if"),),
        NIGHTS,
    ),
    Mutant(
        "order is lost where files are kept",
        "batchgen/store/snapshot.py",
        (("for start in sorted(found) for file", "for start in found for file"),),
        NIGHTS,
    ),
    Mutant(
        "a file that an older snapshot shares is removed",
        LEDGER,
        (("for number in names for name in", "for number in names[-1:] for name in"),),
        (*PYTEST, "tests/unit/test_ledger.py", "-k", "lists"),
    ),
    Mutant(
        "a split doubles a row",
        "batchgen/store/snapshot.py",
        (("            start = at\n", "            start = at - 1\n"),),
        (*PYTEST, "tests/unit/test_publish.py"),
    ),
    Mutant(
        "files of another schema are kept",
        KEEPING,
        (
            (
                "if manifest is not None and manifest.is_tiled and manifest.schema == schema:",
                "if manifest is not None and manifest.is_tiled:",
            ),
            ("one.is_tiled and one.schema == schema for one", "one.is_tiled for one"),
        ),
        (*PYTEST, "tests/e2e/test_sharing.py", "-k", "schema"),
    ),
    Mutant(
        "damage of a shared file is told of the newest snapshot only",
        "batchgen/store/verify.py",
        (("numbers_of[file.name][:-1]", "()"),),
        (*PYTEST, "tests/e2e/test_sharing.py", "-k", "damage"),
    ),
    Mutant(
        "damage is mended in the newest snapshot only",
        "batchgen/store/verify.py",
        (('_remedy(ledger, file, f"{_BRING}, or prune it")', 'f"{_BRING}, or prune it"'),),
        (*PYTEST, "tests/e2e/test_sharing.py", "-k", "damage"),
    ),
    Mutant(
        "what was rolled up of a part is believed although the part is another by now",
        "batchgen/store/footers.py",
        ((" and _mark(storage, told.name) == [*told[4:]]:", ":"),),
        (*PYTEST, "tests/unit/test_ledger.py", "-k", "rolled_up"),
    ),
    Mutant(
        "keys of a dead worker's rows stay known to dedupe",
        "batchgen/cluster/driver.py",
        (
            (
                "                    if passed and row in mine\n",
                "                    if not prefix\n",
            ),
        ),
        (*PYTEST, "tests/e2e/test_fleet.py", "-k", "equal_requests"),
    ),
)
