# Each of demo, test and bench does all of its own set-up, on a fresh Debian machine too.

PYTHON ?= python3
BIN := .venv/bin
# Two test files at a time: a VM under TCG has a busy vCPU or waits, seldom two busy ones. In the
# order of collection: the files with few tests, which would come last, are those that take long.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
PACKAGES := gcc libc6-dev python3-dev python3-venv qemu-system-x86 qemu-system-common \
	mmdebstrap e2fsprogs kmod debian-archive-keyring
# For tests only: a libvirtd of their own, terminals to look at, a debugger.
PACKAGES += libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients tmux strace
# Where virtiofsd is no part of QEMU any more it is a package of its own.
PACKAGES += $(shell apt-cache show virtiofsd >/dev/null 2>&1 && echo virtiofsd)

.PHONY: demo test bench fuzz stress kernels killtest soak shapes namespaces liar sanitize valgrind lint \
	lint-python lint-c unit smoke smoke-bench smoke-fuzz vm setup packages clean

demo: setup
	$(BIN)/python -m ovr demo $(DEMO)

test: lint unit smoke vm

bench: setup
	$(BIN)/python -m pytest bench -rs $(BENCH)

# FUZZ="--seconds 60" for each target, or FUZZ="--executions 1000000" for all; see docs/fuzzing.md.
fuzz: setup
	$(MAKE) packages PACKAGES=clang
	$(MAKE) packages PACKAGES="libclang-rt-$$(clang -dumpversion | cut -d. -f1)-dev"
	$(BIN)/pip install -q --group fuzz
	$(BIN)/python -m tests.fuzz $(FUZZ)

# The tests with AddressSanitizer and UBSan in extension and agent: SANITIZE="tests/vm/test_ps.py" for
# some of them, SANITIZE=--all for those on VMs, too. The agent under valgrind: VALGRIND=FILE likewise.
sanitize: setup
	$(BIN)/python -m tests.sanitize sanitizers $(SANITIZE)

valgrind: setup
	$(MAKE) packages PACKAGES=valgrind
	$(BIN)/python -m tests.sanitize valgrind $(VALGRIND)

# STRESS="--restores 100", or with --unprotected to see what the protection is for; docs/stress.md.
stress: setup
	$(BIN)/python -m tests.stress $(STRESS)

# The pool of programs on every kernel and machine of docs/support-matrix.md, which it writes; hours
# under TCG. KERNELS="--missing" for what is not recorded yet, KERNELS="--only 'trixie numa=2'".
kernels: setup
	$(BIN)/python -m tests.kernels $(KERNELS)

# Guests and agents that lie: LIAR="--rounds 50 --seed 7", or only about some things: LIAR="btf agent".
liar: setup
	$(BIN)/python -m tests.liar $(LIAR)

# docs/namespaces.md: CRIU alone beside ovr; an hour or two under TCG. NAMESPACES="--suite trixie".
namespaces: setup
	$(BIN)/python -m tests.namespaces $(NAMESPACES)

# KILL="--points 50", of each victim; docs/stress.md.
killtest: setup
	$(BIN)/python -m tests.kill $(KILL)

# SOAK="--restores 1000"; docs/stress.md.
soak: setup
	$(BIN)/python -m tests.soak $(SOAK)

# Very much of one thing, restored by CRIU alone and from outside: SHAPES="areas --suite forky".
shapes: setup
	$(BIN)/python -m tests.shapes $(SHAPES)

# C to lint: not what Cython generates, nor the source of recorded images, which stays as recorded.
LIST_C := find ovr tests bench -name '*.[ch]' ! -name _fastcopy.c ! -path '*/images/data/*'

# mypy and the benchmarks keep one core busy, what runs beside them the other one.
BESIDE := --no-print-directory --output-sync --jobs 2

lint: setup
	$(MAKE) $(BESIDE) lint-python lint-c

lint-python:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	PATH=$(BIN):$$PATH cython-lint ovr/_fastcopy.pyx ovr/native/*.pxi
	$(BIN)/python -m mypy.stubtest ovr._fastcopy --mypy-config-file pyproject.toml \
		--ignore-disjoint-bases --allowlist tests/stubtest.allow
	$(BIN)/codespell

lint-c:
	$(LIST_C) | xargs $(BIN)/clang-format --dry-run --Werror
	$(LIST_C) | xargs $(BIN)/python -m tests.lint_c

unit: setup
	$(BIN)/python -m pytest tests/unit -q $(PARALLEL) $(PYTEST)

# The benchmarks run, small and once; nobody judges their times. The fuzz targets run for seconds.
smoke: setup
	$(MAKE) $(BESIDE) smoke-bench smoke-fuzz

smoke-bench:
	OVR_BENCH=smoke $(BIN)/python -m pytest bench -q

smoke-fuzz:
	$(BIN)/python -m pytest tests/fuzz -q -n 2

vm: setup
	$(BIN)/python -m pytest tests/vm -v -rs --durations=40 $(PARALLEL) $(PYTEST)

setup: packages .venv/ready

packages:
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f '$${db:Status-Abbrev}' $$p 2>/dev/null \
		| grep -q '^ii' || echo $$p; done); \
	[ -z "$$missing" ] || { sudo=$$([ $$(id -u) = 0 ] || echo sudo); set -x; \
		$$sudo apt-get update -q && $$sudo apt-get install -qy --no-install-recommends $$missing; }

.venv/ready: pyproject.toml setup.py ovr/_fastcopy.pyx $(wildcard ovr/native/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q --group dev
	$(BIN)/pip install -q --no-build-isolation --editable .
	touch $@

clean:
	rm -rf .venv build ovr/_fastcopy.c ovr/*.so *.egg-info
