# SPDX-License-Identifier: GPL-2.0-only
#
# libkvscratch as a shared and a static library, and make install. Part of Makefile.

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
DATADIR ?= $(PREFIX)/share
MANDIR ?= $(DATADIR)/man
PKGCONFIGDIR ?= $(LIBDIR)/pkgconfig
COMPLETIONSDIR ?= $(DATADIR)/bash-completion/completions
# udev and systemd look into /usr/lib and /usr/local/lib, also where LIBDIR is another
SYSTEMDIR ?= $(PREFIX)/lib

OBJCOPY ?= objcopy
SONAME := libkvscratch.so.0
SHARED := build/libkvscratch.so.$(VERSION)
LIBRARY_OBJECTS := $(LIBKVSCRATCH:tools/lib/%.c=build/lib/%.o)

# The versions of ggml's interface to its plug-ins
GGML_APIS := 2 3
GGML_PLUGINS := $(GGML_APIS:%=build/ggml-%/libggml-kvscratch.so)

.PHONY: lib shared-tools ggml install uninstall

ggml: $(GGML_PLUGINS)
lib: $(SHARED) build/libkvscratch.a
shared-tools: $(TOOLS:%=build/shared/%)

build/lib build/shared:
	mkdir -p $@

$(LIBRARY_OBJECTS): build/lib/%.o: tools/lib/%.c $(HEADERS) | build/lib
	$(CC) $(CPPFLAGS) $(CFLAGS) -pthread -fPIC -fvisibility=hidden -c -o $@ $<

# The links beside it are what the loader and the linker look for.
$(SHARED): $(LIBRARY_OBJECTS) tools/lib/libkvscratch.map
	$(CC) $(CFLAGS) $(LDFLAGS) -pthread -shared -Wl,-soname,$(SONAME) -Wl,-z,defs \
		-Wl,--version-script=tools/lib/libkvscratch.map -o $@ $(LIBRARY_OBJECTS)
	ln -sf $(@F) build/$(SONAME)
	ln -sf $(SONAME) build/libkvscratch.so

# One object, in which what is hidden is local: its names cannot meet a program's.
build/libkvscratch.a: $(LIBRARY_OBJECTS)
	$(CC) -r -nostdlib -o $(@:.a=.o) $(LIBRARY_OBJECTS)
	$(OBJCOPY) --localize-hidden $(@:.a=.o)
	rm -f $@
	$(AR) rcs $@ $(@:.a=.o)

build/ggml-%/libggml-kvscratch.so: $(wildcard tools/ggml/*.[ch]) $(SHARED) $(HEADERS)
	mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -pthread -fPIC -fvisibility=hidden -DGGML_PLUGIN_API=$* \
		-shared -Wl,-z,defs -o $@ $(filter tools/ggml/%.c,$^) -Lbuild -lkvscratch

# What names directories is made anew each time: they are those of this call.
.PHONY: build/paths
build/paths:
	mkdir -p $@
	sed -e 's,@PREFIX@,$(PREFIX),' -e 's,@LIBDIR@,$(LIBDIR),' -e 's,@INCLUDEDIR@,$(INCLUDEDIR),' \
		-e 's,@VERSION@,$(VERSION),' tools/lib/libkvscratch.pc.in >$@/libkvscratch.pc
	sed 's,/usr/bin/,$(BINDIR)/,' tools/system/kvscratch-hold@.service >$@/kvscratch-hold@.service

# What is installed needs no copy of the library, but for what that does not export.
kvscratchctl-inside := build/lib/npy.o build/lib/output.o build/lib/container.o build/lib/json.o
kvdecode-inside := build/lib/output.o
define shared_program
build/shared/$(1): $(2) $(SHARED) $(HEADERS) | build/shared
	$$(CC) $$(CPPFLAGS) $$(CFLAGS) $$(LDFLAGS) -o $$@ $(2) $($(1)-inside) -Lbuild -lkvscratch -lm
endef
$(foreach tool,$(TOOLS),$(eval $(call shared_program,$(tool),$($(tool)-sources))))

# What goes where, for install and uninstall
install-directories :=
define into
install-directories += $(1)
into-$(1) += $(2)
endef
$(eval $(call into,$(BINDIR),$(TOOLS:%=build/shared/%)))
$(eval $(call into,$(LIBDIR),$(SHARED) build/libkvscratch.a))
$(foreach api,$(GGML_APIS),$(eval $(call into,$(LIBDIR)/kvscratch/ggml-$(api),build/ggml-$(api)/libggml-kvscratch.so)))
$(eval $(call into,$(PKGCONFIGDIR),build/paths/libkvscratch.pc))
$(eval $(call into,$(INCLUDEDIR),tools/lib/libkvscratch.h))
$(eval $(call into,$(INCLUDEDIR)/linux,uapi/linux/kvscratch.h))
$(foreach section,1 3 4 7,$(eval $(call into,$(MANDIR)/man$(section),$(wildcard tools/man/*.$(section)))))
$(eval $(call into,$(COMPLETIONSDIR),$(wildcard tools/completion/*)))
$(eval $(call into,$(SYSTEMDIR)/udev/rules.d,tools/system/60-kvscratch.rules))
$(eval $(call into,$(SYSTEMDIR)/sysusers.d,tools/system/sysusers.d/kvscratch.conf))
$(eval $(call into,$(SYSTEMDIR)/modules-load.d,tools/system/modules-load.d/kvscratch.conf))
$(eval $(call into,$(SYSTEMDIR)/systemd/user,build/paths/kvscratch-hold@.service))
# as are the names that the loader and the linker know
library-links := $(LIBDIR)/$(SONAME) $(LIBDIR)/libkvscratch.so

# Stop at the first command that fails.
define install_into
$(if $(into-$(1)),install -d '$(DESTDIR)$(1)'
	install -m $(if $(filter $(BINDIR),$(1)),755,644) $(into-$(1)) '$(DESTDIR)$(1)'
	)
endef

install: lib shared-tools ggml build/paths
	$(foreach directory,$(install-directories),$(call install_into,$(directory)))
	ln -sf $(notdir $(SHARED)) '$(DESTDIR)$(LIBDIR)/$(SONAME)'
	ln -sf $(SONAME) '$(DESTDIR)$(LIBDIR)/libkvscratch.so'

uninstall:
	rm -f $(foreach directory,$(install-directories),\
		$(patsubst %,'$(DESTDIR)$(directory)/%',$(notdir $(into-$(directory))))) \
		$(library-links:%='$(DESTDIR)%')
