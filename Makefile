# Every command a developer needs. `make` alone lists them.

# One build folder for all clones, because RocksDB takes long to compile, and one profile for the same reason.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)
export CARGO_TARGET_DIR ?= $(CACHE)/trefoil/target
# RocksDB's own build is kept apart: Cargo would repeat it, 17 minutes on two cores, whenever the features of a build
# dependency change.
export ROCKSDB_KEPT := $(CACHE)/trefoil/rocksdb-$(shell sed -n '/^name = "librocksdb-sys"/{n;s/version = "\(.*\)"/\1/p;}' Cargo.lock)
ifneq ($(wildcard $(ROCKSDB_KEPT)/librocksdb.a),)
export ROCKSDB_LIB_DIR := $(ROCKSDB_KEPT)
export ROCKSDB_STATIC := 1
endif
CARGO_FLAGS := --release --locked --workspace
PREFIX ?= /usr/local
UNITS ?= /etc/systemd/system

.PHONY: help deps build install demo test simulate scale sabotage bench recovery jepsen jepsen-all jepsen-selftest fmt

help:
	@echo 'make demo     a whole cloud on this machine, told step by step, verified and removed again (root)'
	@echo 'make test     every check and test; ends with a line of counts'
	@echo 'make simulate  a cloud from each of SEEDS seeds, under faults, beginning with FROM; or the story of one SEED'
	@echo 'make scale    what a machine costs the quorum as the cloud grows, up to a million of them; MACHINES=1000,10000 for less'
	@echo 'make sabotage  breaks the product in one place after another: does a test notice? (ONLY=part of a name)'
	@echo 'make bench    writes, reads and failover beside etcd, lists, watchers and heartbeats of a larger cloud, machines beside plain libvirt'
	@echo "              (ARGS='--grown 20000 --hosts 10000' and more: ARGS=--help)"
	@echo 'make recovery  cuts the power of real hosts in namespaces TIMES times (20), and measures (root)'
	@echo 'make jepsen   clients and machines on a real cloud under faults of every family, ten minutes; a verdict'
	@echo '              (TIME=seconds SEED=number NEMESIS=kill,host,mix WORKLOAD=register,machines CONTROLLERS=5)'
	@echo 'make jepsen-all  each family for itself, five controllers, mixes, every state of the links: hours'
	@echo 'make jepsen-selftest  bugs put into a copy of the product: does the named checker find each? (ONLY=part of a name)'
	@echo 'make build    the binaries, in $(CARGO_TARGET_DIR)/release'
	@echo 'make install  what was built, its units, user and directories (root; PREFIX=$(PREFIX) UNITS=$(UNITS) DESTDIR=)'
	@echo 'make fmt      write the source in the one format'
	@echo 'make deps     say which Debian packages are missing; as root, install them (FOR=build or FOR=demo)'

deps:
	@scripts/deps $(or $(FOR),demo)

build:
	@scripts/deps build
	cargo build $(CARGO_FLAGS) --bins
	@scripts/keep-rocksdb

# What is built into DESTDIR is packed and unpacked elsewhere: no user and no directory of this machine belongs to it.
install:
	@test -x $(CARGO_TARGET_DIR)/release/trefoil || { echo 'nothing is built in $(CARGO_TARGET_DIR): make build' >&2; exit 1; }
	install -D -m 0755 $(CARGO_TARGET_DIR)/release/trefoil $(DESTDIR)$(PREFIX)/bin/trefoil
	install -d $(DESTDIR)$(UNITS)
	@for unit in packaging/systemd/*.service; do \
	  sed 's|/usr/local/bin/|$(PREFIX)/bin/|' $$unit >$(DESTDIR)$(UNITS)/$${unit##*/} || exit 1; \
	  chmod 0644 $(DESTDIR)$(UNITS)/$${unit##*/}; \
	done
ifeq ($(DESTDIR),)
	getent passwd trefoil >/dev/null || useradd --system --home-dir /var/lib/trefoil --shell /usr/sbin/nologin trefoil
	install -d -m 0755 /var/lib/trefoil
	install -d -m 0711 -o trefoil -g trefoil /var/lib/trefoil/controller
	test ! -d /run/systemd/system || systemctl daemon-reload
endif

demo:
	@scripts/deps demo
	cargo build $(CARGO_FLAGS) --bins
	@scripts/keep-rocksdb
	@$(CARGO_TARGET_DIR)/release/demo

test:
	@scripts/deps build
	@scripts/test; status=$$?; scripts/keep-rocksdb; exit $$status

simulate:
	@scripts/deps build
	cargo build --release --locked --workspace --bin simulate
	@$(CARGO_TARGET_DIR)/release/simulate $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FROM),--from $(FROM)) $(if $(SEED),--seed $(SEED))

scale:
	@scripts/deps build
	cargo build --release --locked --workspace --bin scale
	@$(CARGO_TARGET_DIR)/release/scale $(if $(MACHINES),--machines $(MACHINES))

sabotage:
	@scripts/deps build
	cargo build --release --locked --workspace --bin sabotage
	@$(CARGO_TARGET_DIR)/release/sabotage --release $(if $(ONLY),--only '$(ONLY)')

bench: build
	@$(CARGO_TARGET_DIR)/release/bench --json $(CARGO_TARGET_DIR)/bench.json $(ARGS)

recovery: build
	@scripts/deps demo
	@scripts/recovery $(CARGO_TARGET_DIR)/release/trefoil $(CARGO_TARGET_DIR)/recovery $(TIMES)

jepsen: build
	@$(CARGO_TARGET_DIR)/release/trefoil-jepsen --seconds $(or $(TIME),600) $(if $(SEED),--seed $(SEED)) $(if $(NEMESIS),--nemesis $(NEMESIS)) $(if $(WORKLOAD),--workload $(WORKLOAD)) $(if $(CONTROLLERS),--controllers $(CONTROLLERS))

jepsen-all: build
	@scripts/jepsen-all $(CARGO_TARGET_DIR)/release/trefoil-jepsen $(CARGO_TARGET_DIR)/jepsen $(TIME)

jepsen-selftest:
	@scripts/deps build
	cargo build --release --locked --workspace --bin trefoil-jepsen --bin selftest
	@$(CARGO_TARGET_DIR)/release/selftest --release $(if $(ONLY),--only '$(ONLY)')

fmt:
	cargo fmt --all
