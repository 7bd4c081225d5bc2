#!/bin/bash
# Builds the small bootable guest image that the demonstration and the tests run: BIOS boot, a Debian cloud kernel,
# busybox, the QEMU guest agent; 96 MB of memory are enough. No root, no loop device.
#
#   image/build.sh [--boot] [OUT.qcow2]      prints the path of the image on its last line
#
# OUT defaults to guest.qcow2 in the cache, ${XDG_CACHE_HOME:-$HOME/.cache}/trefoil/guest, where the downloaded .deb
# files stay too. Nothing is built again while neither these sources nor the packages have changed.
# --boot boots the result in QEMU and waits for its TREFOIL-READY line.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin MTOOLS_SKIP_CHECK=1 LC_ALL=C
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/trefoil/guest
boot=no; [ "${1:-}" = --boot ] && { boot=yes; shift; }
out=$(realpath -m "${1:-$cache/guest.qcow2}")
boot_mb=20 root_mb=24 # What the kernel with its initrd, and the root file system, need, with some room.

say() { echo "guest image: $*" >&2; }
die() { say "$*"; exit 1; }

for tool in busybox:busybox-static cpio:cpio mke2fs:e2fsprogs mkfs.vfat:dosfstools mcopy:mtools sfdisk:fdisk \
  syslinux:syslinux qemu-img:qemu-utils strip:binutils dpkg-deb:dpkg sha256sum:coreutils; do
  command -v "${tool%%:*}" >/dev/null || die "${tool%%:*} is missing: install the package ${tool##*:}"
done
mbr=/usr/lib/syslinux/mbr/mbr.bin
[ -s $mbr ] || die "$mbr is missing: install the package syslinux-common"
busybox=$(command -v busybox)
ldd "$busybox" >/dev/null 2>&1 && die "$busybox is not static: install the package busybox-static"

# ---- packages: downloaded once, only unpacked, never installed
mkdir -p "$cache/deb" "$(dirname "$out")"
exec 9>"$cache/lock"; flock 9
download() { (cd "$cache/deb" && apt-get -qq -o APT::Sandbox::User=root download "$1"); }
# Lists of some days ago name versions that are no longer there; only root can renew them.
fetch() {
  say "downloading $1"
  download "$1" || { apt-get -qq update && download "$1"; } || die "cannot download $1: as root, apt-get update may help"
}
deb() { compgen -G "$cache/deb/$1" | sort | tail -1; }
if [ -z "$(deb 'linux-image-*-cloud-amd64_*.deb')" ]; then
  kernel=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ {print $2; exit}')
  [ -n "$kernel" ] || die "apt knows no linux-image-cloud-amd64: run apt-get update"
  fetch "$kernel"
fi
if [ -z "$(deb 'qemu-guest-agent_*.deb')" ]; then
  fetch qemu-guest-agent
fi
kernel_deb=$(deb 'linux-image-*-cloud-amd64_*.deb') agent_deb=$(deb 'qemu-guest-agent_*.deb')

# ---- nothing to do?
key=$({ cd "$here" && find . -type f | sort | xargs sha256sum; sha256sum "$busybox"; basename "$kernel_deb" "$agent_deb"; } | sha256sum | cut -c1-16)
made=$cache/guest-$key.qcow2
work=$(mktemp -d "$cache/work.XXXXXX"); trap 'rm -rf "$work"' EXIT

build() {
  local root=$work/root ird=$work/ird modules version
  mkdir -p "$work/x" "$ird"/{bin,dev,proc,sys,root,m}
  dpkg-deb -x "$kernel_deb" "$work/x"; dpkg-deb -x "$agent_deb" "$work/x"
  version=$(ls "$work/x/lib/modules"); modules=$work/x/lib/modules/$version/kernel
  copy_modules() {
    local to=$1 m f; shift
    for m in "$@"; do
      f=$(find "$modules" -name "$m.ko" | head -1); [ -n "$f" ] || die "$(basename "$kernel_deb") has no module $m"
      strip --strip-debug -o "$to/$m.ko" "$f" 2>/dev/null || cp "$f" "$to/$m.ko"
    done
  }

  # The initial file system: only what finds the disk.
  cp "$busybox" "$ird/bin/busybox"; ln -s busybox "$ird/bin/sh"
  copy_modules "$ird/m" virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk
  install -m 755 "$here/initramfs/init" "$ird/init"
  (cd "$ird" && find . | sort | cpio -o -H newc -R 0:0 --quiet | gzip -9n) > "$work/initrd.gz"

  # The root file system.
  mkdir -p "$root"/{bin,sbin,dev,proc,sys,run,tmp,data,mnt,root,usr/bin,usr/sbin,lib/mods,var}
  cp -r "$here/rootfs/." "$root/"
  find "$root" -type f -exec chmod 755 {} +
  ln -s ../run "$root/var/run"; ln -s ../run "$root/var/log"; ln -s ../run/resolv.conf "$root/etc/resolv.conf"
  cp "$busybox" "$root/bin/busybox"
  # busybox lists itself: a link from it to itself would break init.
  for a in $("$busybox" --list | grep -vx busybox); do [ -e "$root/bin/$a" ] || ln -s /bin/busybox "$root/bin/$a"; done
  ln -s /bin/busybox "$root/sbin/init"; ln -s ../bin/shutdown "$root/sbin/shutdown"
  copy_modules "$root/lib/mods" failover net_failover virtio_net button evdev virtio_balloon virtio-rng \
    virtio_console virtio_mem nls_cp437 nls_ascii fat vfat cdrom isofs
  install -m 755 "$work/x/usr/sbin/qemu-ga" "$root/usr/sbin/qemu-ga"
  ldd "$root/usr/sbin/qemu-ga" | grep 'not found' >&2 && die "the guest agent's libraries are missing: install libglib2.0-0 and liburing2"
  ldd "$root/usr/sbin/qemu-ga" | awk '/=>/ {print $3} /ld-linux/ {print $1}' | while read -r l; do
    mkdir -p "$root$(dirname "$l")"; cp -L "$l" "$root$l"
  done
  echo guest > "$root/etc/hostname"; echo 'root::0:0:root:/root:/bin/sh' > "$root/etc/passwd"
  echo 'root:x:0:' > "$root/etc/group"; echo '127.0.0.1 localhost' > "$root/etc/hosts"

  # The disk: master boot record | FAT16 with loader, kernel, initrd | ext4.
  local disk=$work/disk.raw p1=1 p2=$((1 + boot_mb))
  truncate -s $((1 + boot_mb + root_mb))M "$disk"
  printf 'label: dos\nlabel-id: 0x7ef011ed\nstart=%s, size=%s, type=e, bootable\nstart=%s, size=%s, type=83\n' \
    $((p1 * 2048)) $((boot_mb * 2048)) $((p2 * 2048)) $((root_mb * 2048)) | sfdisk -q "$disk"
  truncate -s ${boot_mb}M "$work/p1"; mkfs.vfat -F 16 -n GUESTBOOT -i 7ef011ed -h $((p1 * 2048)) "$work/p1" >/dev/null
  mcopy -i "$work/p1" "$work/x/boot/vmlinuz-$version" ::vmlinuz
  mcopy -i "$work/p1" "$work/initrd.gz" ::initrd.gz; mcopy -i "$work/p1" "$here/syslinux.cfg" ::syslinux.cfg
  syslinux --install "$work/p1"
  truncate -s ${root_mb}M "$work/p2"
  mke2fs -q -t ext4 -L guestroot -O ^has_journal,^metadata_csum -m 0 -E root_owner=0:0,lazy_itable_init=0 -d "$root" "$work/p2"
  tune2fs -O has_journal -J size=1 "$work/p2" >/dev/null

  # Checked before they are put together.
  e2fsck -fn "$work/p2" >"$work/check" 2>&1 || { cat "$work/check" >&2; die "the root file system is damaged"; }
  fsck.vfat -n "$work/p1" >"$work/check" 2>&1 || { cat "$work/check" >&2; die "the boot file system is damaged"; }
  for f in vmlinuz initrd.gz syslinux.cfg ldlinux.sys; do mdir -i "$work/p1" -b -a "::$f" >/dev/null || die "the boot file system lacks $f"; done

  dd if=$mbr of="$disk" bs=440 count=1 conv=notrunc status=none
  dd if="$work/p1" of="$disk" bs=1M seek=$p1 conv=notrunc,sparse status=none
  dd if="$work/p2" of="$disk" bs=1M seek=$p2 conv=notrunc,sparse status=none
  qemu-img convert -O qcow2 "$disk" "$work/guest.qcow2"
  qemu-img check -q "$work/guest.qcow2" || die "qemu-img finds the image damaged"
  rm -f "$cache"/guest-*.qcow2
  mv "$work/guest.qcow2" "$made"
}

boots() {
  local log=$work/console qemu limit=180 # Seconds; emulated on a busy machine it takes up to 40.
  qemu-img create -q -f qcow2 -b "$made" -F qcow2 "$work/try.qcow2"
  qemu-system-x86_64 -machine pc,accel=tcg -m 96 -display none -no-reboot -serial "file:$log" -nic none \
    -drive "file=$work/try.qcow2,if=virtio,cache=unsafe" & qemu=$!
  for _ in $(seq $((limit * 4))); do
    grep -q TREFOIL-READY "$log" 2>/dev/null && break
    kill -0 $qemu 2>/dev/null || break
    sleep 0.25
  done
  kill $qemu 2>/dev/null || true; wait $qemu 2>/dev/null || true
  grep -a TREFOIL-READY "$log" >&2 || { cat "$log" >&2; die "the image did not boot within $limit s"; }
}

if [ ! -s "$made" ]; then build; say "built in $SECONDS s"; fi
[ $boot = no ] || { boots; say "booted"; }
[ "$made" -ef "$out" ] || { cp --reflink=auto "$made" "$out.new"; mv "$out.new" "$out"; }
say "$(qemu-img info "$out" | awk -F': ' '/virtual size|disk size/ {printf "%s%s", s, $0; s=", "}')"
echo "$out"
