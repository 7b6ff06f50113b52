"""Attacks on the sandbox: its host's network, files, environment and rights. sandbox_attacks.py says what an attack is."""

from tests.rewards.sandbox_attacks import REFUSED, attack

# --- network ---


@attack(outside=True)
def connect_to_loopback(host):
    import socket

    socket.create_connection(("127.0.0.1", host["port"]), timeout=1).close()
    return True


@attack(outside=True)
def open_a_socket_by_ctypes(host):
    import ctypes

    return ctypes.CDLL(None).socket(2, 1, 0) >= 0


@attack(outside=True)
def open_an_ipv6_socket(host):
    import socket

    socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    return True


@attack(outside=True)
def send_a_datagram(host):
    import socket

    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", host["port"])) == 1


@attack(ends="error: gaierror|" + REFUSED)
def resolve_a_name(host):
    import socket

    return socket.getaddrinfo("example.invalid", 80) != []


@attack(outside=True)
def listen_to_others(host):
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        return True


@attack(outside=True)
def connect_to_a_unix_socket(host):
    import socket

    with socket.socket(socket.AF_UNIX) as client:
        client.connect(host["unix"])
        return True


@attack(outside=True)
def connect_to_an_abstract_unix_socket(host):
    import socket

    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0" + host["abstract"])
        return True


@attack(outside=True)
def ask_the_kernel_for_its_interfaces(host):
    import socket

    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()
    return True


@attack(outside=True)
def make_a_pair_to_pass_descriptors(host):
    import socket

    return len(socket.socketpair()) == 2


@attack()
def go_around_the_socket_call_with_io_uring(host):
    import ctypes

    return ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(256)) >= 0


# --- files of the host ---


@attack(outside=True)
def read_the_accounts(host):
    return "root" in open("/etc/passwd").read()


@attack(outside=True)
def read_a_file_of_the_host(host):
    return host["secret"] in open(host["canary"]).read()


@attack(outside=True)
def read_the_repository(host):
    return "jaxrl" in open(host["repo"] + "/setup.py").read()


@attack(outside=True)
def look_into_the_home(host):
    import os

    # Python itself may live there; then its path is to be seen, and nothing beside it.
    found = [name for name in os.listdir(host["home"]) if not host["library"].startswith(os.path.join(host["home"], name) + "/")]
    return len(found) > 0 or host["home"] == "/nonexistent"


@attack(ends="value: False")
def search_the_whole_tree_for_a_name(host):
    import os

    for folder, folders, files in os.walk("/"):
        if folder == "/usr":
            folders[:] = [name for name in folders if name != "lib"]
        if host["library"].startswith(folder) and folder == os.path.dirname(host["library"]):
            folders.clear()
        if os.path.basename(host["canary"]) in files:
            return True
    return False


@attack(outside=True)
def follow_a_symbolic_link(host):
    import os
    import tempfile

    link = os.path.join(tempfile.mkdtemp(), "link")
    os.symlink(host["canary"], link)
    return host["secret"] in open(link).read()


@attack(outside=True)
def follow_a_hard_link(host):
    import os

    os.link(host["canary"], host["canary"] + ".hard")
    os.unlink(host["canary"] + ".hard")
    return True


@attack(outside=True)
def climb_out_by_dots(host):
    return host["secret"] in open("/".join([".."] * 20) + host["canary"]).read()


@attack()
def change_python_itself(host):
    import os

    open(os.__file__, "a").close()
    return True


@attack()
def make_python_s_library_writable(host):
    import os

    os.chmod(os.path.dirname(os.__file__), 0o777)
    return True


@attack()
def write_beside_the_own_folder(host):
    import os

    made = []
    for folder in ("/", "/dev", "/usr", "/usr/lib", "/lib", os.path.dirname(os.__file__)):
        try:
            os.mkdir(os.path.join(folder, "sandboxattack"))
            made.append(folder)
        except OSError:
            pass
    return made != []


@attack(ends="value: False", outside=True)
def find_devices_and_system_folders(host):
    import os

    seen = [path for path in ("/sys/kernel", "/run", "/var/run", "/etc", "/home", "/dev/mem", "/dev/tty", "/dev/shm") if os.path.exists(path)]
    extra = set(os.listdir("/dev")) - {"null", "zero", "urandom"}
    return bool(seen or extra)


@attack(ends="value: False", outside=True)
def look_at_processes(host):
    import os

    return os.path.exists("/proc/self") or os.path.exists(f"/proc/{host['pid']}")


@attack()
def read_the_parent_s_memory(host):
    with open(f"/proc/{host['pid']}/mem", "rb") as file:
        return file.seek(0) == 0


@attack(outside=True)
def read_the_environment_of_process_1(host):
    return len(open("/proc/self/environ", "rb").read()) > 0


@attack()
def make_a_block_device(host):
    import os
    import stat

    os.mknod("disk", stat.S_IFBLK | 0o600, os.makedev(254, 0))
    return True


@attack()
def open_a_file_by_its_handle(host):
    import ctypes
    import struct

    handle = ctypes.create_string_buffer(struct.pack("IiQ", 8, 1, 2))
    return ctypes.CDLL(None).open_by_handle_at(0, handle, 0) >= 0


@attack()
def chroot_and_climb(host):
    import os

    os.mkdir("jail")
    os.chroot("jail")
    for _ in range(20):
        os.chdir("..")
    os.chroot(".")
    return os.path.exists("/etc/passwd")


@attack()
def mount_something(host):
    import ctypes

    libc = ctypes.CDLL(None)
    return 0 in [libc.mount(b"x", b"/box", kind, 0, None) for kind in (b"proc", b"tmpfs", b"sysfs", b"devtmpfs", b"overlay")]


@attack()
def mount_by_the_new_calls(host):
    import ctypes

    libc = ctypes.CDLL(None)
    return libc.syscall(430, b"proc", 0) >= 0 or libc.syscall(428, -100, b"/", 1) >= 0


@attack()
def make_the_view_writable(host):
    import ctypes

    libc = ctypes.CDLL(None)
    return libc.mount(b"none", b"/", None, 32 | 4096, None) == 0 or libc.umount2(b"/box", 2) == 0


@attack(ends="value: False")
def find_open_descriptors(host):
    import os
    import stat

    for number in range(4096):
        try:
            kind = os.fstat(number).st_mode
        except OSError:
            continue
        if number > 3 or not (stat.S_ISFIFO(kind) or stat.S_ISCHR(kind)):
            return True
    return False


# --- environment and credentials ---


@attack(ends="value: False", outside=True)
def read_the_environment(host):
    import os

    return host["secret"] in " ".join(os.environ.values())


@attack(ends="value: False", outside=True)
def read_the_environment_by_ctypes(host):
    import ctypes

    entries = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    i, found = 0, b""
    while entries and entries[i]:
        found += entries[i]
        i += 1
    return host["secret"].encode() in found


@attack(ends="value: False")
def become_root(host):
    import os

    try:
        os.setuid(0)
    except OSError:
        return False
    return True


@attack(ends="value: False")
def take_capabilities_back(host):
    import ctypes
    import struct

    libc = ctypes.CDLL(None)
    header, data = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0xFFFFFFFF] * 6)
    return libc.capset(header, data) == 0 or libc.prctl(38, 0, 0, 0, 0) == 0 or libc.prctl(28, 0, 0, 0, 0) == 0


@attack()
def read_the_kernel_s_keys(host):
    import ctypes

    return any(ctypes.CDLL(None).syscall(250, 0, number, 1, 0, 0) >= 0 for number in (-1, -2, -3, -4, -5))
