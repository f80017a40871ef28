# SPDX-License-Identifier: GPL-2.0-only
#
# make                builds kvscratch.ko for the running kernel
# make help           lists everything else

KDIR ?= /lib/modules/$(shell uname -r)/build

# Programs are static: they run on any kernel's initramfs as they are.
CFLAGS ?= -O2 -g
override CFLAGS += -std=gnu11 -ffp-contract=off -Wall -Wextra -Wshadow
VERSION := 0.1.0
override CPPFLAGS += -Iuapi -Itools/lib -DKVSCRATCH_VERSION='"$(VERSION)"'
LIBKVSCRATCH := $(wildcard tools/lib/*.c)
TOOLS := kvscratchctl kvdecode
kvscratchctl-sources := tools/kvscratchctl.c $(wildcard tools/ctl/*.c) tools/branch.c tools/cli.c \
	tools/interrupt.c
kvdecode-sources := tools/kvdecode.c tools/llama2.c tools/branch.c tools/cli.c tools/interrupt.c
EXAMPLES := $(basename $(notdir $(wildcard tools/examples/*.c tools/examples/*.cc)))

USER_TESTS := $(patsubst tests/user/%.c,%,$(wildcard tests/user/*_test.c))
HEADERS := $(wildcard *.h uapi/linux/*.h tools/*.h tools/ctl/*.h tools/ggml/*.h tools/lib/*.h tests/*.h tests/user/*.h tests/torture/*.h)

.DELETE_ON_ERROR:
.PHONY: all modules_install clean help tools tests tests-32 arm64 python demo test test-all torture bench comparison check
.PHONY: mutants detectors sanitized fuzz fuzz-files coverage deb

all:
	@tests/qemu/plain_path "$$PWD"
	@test -d $(KDIR) || { echo >&2 "make: no kernel headers at $(KDIR): install linux-headers-$$(uname -r), or pass KDIR="; exit 1; }
	$(MAKE) -C $(KDIR) M=$(CURDIR) modules

modules_install: all
	$(MAKE) -C $(KDIR) M=$(CURDIR) modules_install

clean:
	rm -rf build *.o *.ko *.mod *.mod.c .*.cmd .*.d tests/*.o tests/.*.cmd tests/.*.d
	rm -f Module.symvers modules.order .Module.symvers.cmd .modules.order.cmd

help:
	@echo 'make               build kvscratch.ko for the running kernel, or for KDIR='
	@echo 'make modules_install'
	@echo '                   install it into /lib/modules'
	@echo 'make tools         build kvscratchctl and kvdecode into build/'
	@echo 'make python        build the Python package into build/python; PYTHON='
	@echo 'make examples      build those of tools/examples into build/examples/'
	@echo 'make lib           build libkvscratch, shared and static, into build/'
	@echo 'make ggml          build the plug-ins for llama.cpp, into build/ggml-2 and build/ggml-3'
	@echo 'make install       install tools, libraries and manual; DESTDIR= PREFIX= LIBDIR=; also uninstall'
	@echo 'make deb           build and check the Debian packages, into build/deb'
	@echo 'make demo          show the main job in QEMU; MODEL=DIR for a real checkpoint'
	@echo 'make test          run the suites in QEMU; MODEL=DIR adds the story test'
	@echo 'make test-all      the same on every kernel, with KCSAN, a Debian that boots with systemd,'
	@echo '                   and all that takes long'
	@echo 'make torture       kill writers and readers 10^4 times; ROUNDS= SEED= KERNEL='
	@echo 'make bench         what appends, views and a decoder cost, in instructions, beside'
	@echo '                   their peers; fails when one that was met is missed'
	@echo 'make comparison    run the scenarios against memfd and write the table in kvscratch(7)'
	@echo 'make check         checkpatch, sparse, W=1 on four kernels, kernel-doc, cppcheck'
	@echo 'make mutants       break the module in known ways; each has to turn a test red'
	@echo 'make detectors     break it so that each detector of the test kernels has something to see'
	@echo 'make fuzz          fuzz the module for SECONDS=60, SEED=1; what it kept is in build/fuzz'
	@echo 'make fuzz-files    fuzz what reads .npy and safetensors files, for SECONDS=60 in all'
	@echo 'make coverage      which lines of the module KUnit and the user tests run'
	@echo 'make clean         remove what was built, but not the cached kernels'

tools: $(TOOLS:%=build/%)
tests: $(USER_TESTS:%=build/%) build/torture build/fragmented
tests-32: $(USER_TESTS:%=build/%-32)
arm64: $(patsubst %,build/arm64/%,$(TOOLS) $(USER_TESTS) torture)
sanitized: $(TOOLS:%=build/%-sanitized) build/npy_test-sanitized build/scale_test-sanitized build/library_test-sanitized
sanitized: build/files_test-sanitized build/files_replay
sanitized: build/holder_test-sanitized

# Debian's, which has its NumPy
PYTHON ?= /usr/bin/python3
# The library's sources begin with ../.., and so do the objects of them, below the base.
setup = $(PYTHON) tools/python/setup.py -q build --build-base "$$PWD/build/$(1)-objects/base" \
	--build-lib "$$PWD/build/$(1)"

python: | build
	$(call setup,python)
.PHONY: sanitized-python
sanitized-python: | build
	CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all" $(call setup,python-sanitized)

.PHONY: examples
examples: $(EXAMPLES:%=build/examples/%)
sanitized: $(EXAMPLES:%=build/examples/sanitized/%)

build build/arm64 build/examples build/examples/sanitized:
	mkdir -p $@

# Same source, two word sizes; for another machine; and with sanitizers, which need shared
# libraries. $(1) is the end of a name, $(2) the flags that make the difference and $(3) the
# compiler.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all
# The kernel's headers are the same for both; only the package gcc-multilib, which excludes
# compilers for other machines, has a link that says so.
WORD32 = -m32 -idirafter /usr/include/$(shell $(CC) -print-multiarch)
CC_ARM64 = aarch64-linux-gnu-gcc-$(shell $(CC) -dumpversion)
define library
build/objects$(1)/%.o: tools/lib/%.c $(HEADERS) | build/objects$(1)
	$(3) $(2) $$(CPPFLAGS) $$(CFLAGS) -c -o $$@ $$<
build/objects$(1)/library.a: $(LIBKVSCRATCH:tools/lib/%.c=build/objects$(1)/%.o)
	rm -f $$@
	$$(AR) rcs $$@ $$^
build/objects$(1):
	mkdir -p $$@
endef
LIBRARY := build/objects/library.a
$(eval $(call library,,,$$(CC)))
$(eval $(call library,-32,$$(WORD32),$$(CC)))
$(eval $(call library,-arm64,,$$(CC_ARM64)))
$(eval $(call library,-sanitized,$(SANITIZERS),$$(CC)))

define program
build/$(1): $(2) $(LIBRARY) $(HEADERS) | build
	$$(CC) $$(CPPFLAGS) $$(CFLAGS) $(3) -static -o $$@ $(2) $(LIBRARY) -lm
build/$(1)-32: $(2) build/objects-32/library.a $(HEADERS) | build
	$$(CC) $$(WORD32) $$(CPPFLAGS) $$(CFLAGS) $(3) -static -o $$@ $(2) build/objects-32/library.a -lm
build/arm64/$(1): $(2) build/objects-arm64/library.a $(HEADERS) | build/arm64
	$$(CC_ARM64) $$(CPPFLAGS) $$(CFLAGS) $(3) -static -o $$@ $(2) build/objects-arm64/library.a -lm
build/$(1)-sanitized: $(2) build/objects-sanitized/library.a $(HEADERS) | build
	$$(CC) $$(CPPFLAGS) $$(CFLAGS) $(3) $(SANITIZERS) -o $$@ $(2) build/objects-sanitized/library.a -lm
endef

# kselftest_harness.h comes from the Linux source that the test kernel is made of
HARNESS = $(eval HARNESS := -isystem $(shell tests/qemu/kernel source)/tools/testing/selftests)$(HARNESS)
$(foreach tool,$(TOOLS),$(eval $(call program,$(tool),$($(tool)-sources),)))
$(foreach test,$(USER_TESTS),$(eval $(call program,$(test),tests/user/$(test).c,$$(HARNESS))))
$(eval $(call program,torture,tests/torture/torture.c,$$(HARNESS)))
$(eval $(call program,fragmented,tests/user/fragmented.c,$$(HARNESS)))

# C or C++ by the end of the name, so there is no -std for all of what is compiled here.
define example
build/examples/$(1): $(wildcard tools/examples/$(1).c*) $(LIBRARY) $(HEADERS) | build/examples
	$$(CC) $$(CPPFLAGS) $$(filter-out -std=%,$$(CFLAGS)) -static -o $$@ $$< $(LIBRARY) -lstdc++ -lm
build/examples/sanitized/$(1): $(wildcard tools/examples/$(1).c*) build/objects-sanitized/library.a $(HEADERS) | build/examples/sanitized
	$$(CC) $$(CPPFLAGS) $$(filter-out -std=%,$$(CFLAGS)) $(SANITIZERS) -o $$@ $$< \
		build/objects-sanitized/library.a -lstdc++ -lm
endef
$(foreach name,$(EXAMPLES),$(eval $(call example,$(name))))

BENCH := bench scale_bench kvdecode
bench-sources := $(filter-out %/scale_bench.c,$(wildcard tests/bench/*.c))

build/bench: $(bench-sources) tests/bench/bench.h $(LIBRARY) $(HEADERS) | build
	$(CC) $(CPPFLAGS) $(CFLAGS) -static -o $@ $(bench-sources) $(LIBRARY) -llmdb

build/fuzzer: tests/fuzz/fuzz.c $(LIBRARY) $(HEADERS) | build
	$(CC) $(CPPFLAGS) $(CFLAGS) $(HARNESS) -static -o $@ tests/fuzz/fuzz.c $(LIBRARY)

# The arithmetic as the kernel compiles it
build/scale_bench: tests/bench/scale_bench.c $(LIBRARY) $(HEADERS) | build
	$(CC) $(CPPFLAGS) $(CFLAGS) -mgeneral-regs-only -static -o $@ tests/bench/scale_bench.c $(LIBRARY)

# What reads files, with sanitizers: every seed and what is next to it, or a fuzzer
file-targets := tests/files/targets.c
build/files_replay: tests/files/replay.c $(file-targets) tests/files/targets.h build/objects-sanitized/library.a $(HEADERS) | build
	$(CC) $(CPPFLAGS) $(CFLAGS) $(SANITIZERS) -o $@ tests/files/replay.c $(file-targets) \
		build/objects-sanitized/library.a
build/fuzz_%: $(file-targets) tests/files/targets.h $(LIBKVSCRATCH) $(HEADERS) | build
	clang $(CPPFLAGS) $(CFLAGS) -DFUZZ_TARGET=fuzz_$* -fno-sanitize-recover=all \
		-fsanitize=fuzzer,address,undefined -o $@ $(file-targets) $(LIBKVSCRATCH)

demo:
	tests/demo $(if $(MODEL),"$(MODEL)")

test:
	tests/run $(if $(MODEL),"$(MODEL)")

test-all:
	tests/run --all $(if $(MODEL),"$(MODEL)")

torture: ROUNDS = 10000
torture: SEED = 1
torture: KERNEL = debian-stock
# a second for each kill is far more than it takes, and ends what hangs
torture:
	tests/qemu/packages module qemu test
	$(MAKE) --no-print-directory build/torture
	tests/qemu/run --kernel $(KERNEL) --timeout $$(($(ROUNDS) + 300)) -- build/torture $(ROUNDS) $(SEED)

bench:
	tests/qemu/packages module qemu bench
	$(MAKE) --no-print-directory $(BENCH:%=build/%)
	tests/qemu/run --kernel debian-6.1 --virtual-time --mem 2G --out build/bench.out $(BENCH:%=--file build/%) -- \
		sh -c 'bench --json /out/bench.json && scale_bench >/out/scale_bench.txt'
	mv build/bench.out/bench.json build/bench.out/scale_bench.txt build
	cat build/scale_bench.txt
	tests/bench/report build/bench.json build/bench.svg

comparison:
	tests/qemu/packages module qemu kernel test
	$(MAKE) --no-print-directory build/baseline_test
	tests/comparison

check:
	tests/check

deb:
	tests/deb

mutants:
	tests/qemu/packages module qemu kernel test
	tests/mutants

detectors:
	tests/qemu/packages module qemu kernel test
	tests/detectors

fuzz: SECONDS = 60
fuzz: SEED = 1
fuzz:
	tests/qemu/packages module qemu kernel test
	$(MAKE) --no-print-directory build/fuzzer
	FUZZ_TIMEOUT=$$(($(SECONDS) + 900)) tests/fuzz/run --seconds $(SECONDS) --seed $(SEED)
	tests/coverage build/fuzz

fuzz-files: SECONDS = 60
fuzz-files:
	tests/qemu/packages libfuzzer
	$(MAKE) --no-print-directory build/fuzz_npy build/fuzz_safetensors build/fuzz_files
	tests/files/fuzz $(SECONDS)

coverage:
	tests/qemu/packages module qemu kernel test
	tests/coverage

include tools/install.mk
