"""Makes a virtual environment and installs into it; runs under any Python 3, and says plainly what is missing.

    python3 .ci/venv.py FOLDER PIP-ARGUMENT ... [-- PIP-ARGUMENT ...]

A "--" begins another call of pip: what must be installed first stands before it. Does nothing when it was called with the same
arguments before and setup.py has not changed since.
"""

import hashlib
import os
import shutil
import subprocess
import sys

NEEDED = (3, 11)
NAMES = ["python3.12", "python3.11", "python3.13", "python3"]


def main():
    folder, calls = sys.argv[1], split(sys.argv[2:])
    if sys.version_info[:2] < NEEDED:
        other = newer_python()
        if other is None:
            fail("Python %d.%d is too old: install Python 3.11 or newer (3.12 is fine) and try again" % sys.version_info[:2])
        sys.exit(subprocess.call([other] + sys.argv))
    stamp, key = os.path.join(folder, "installed.txt"), fingerprint(calls)
    if os.path.exists(stamp) and key in open(stamp).read().split():
        return
    python = make(folder)
    for call in calls:
        install(folder, python, call)
    with open(stamp, "a") as file:
        file.write(key + "\n")


def split(arguments):
    """The lists between the "--" arguments."""
    calls = [[]]
    for argument in arguments:
        if argument == "--":
            calls.append([])
        else:
            calls[-1].append(argument)
    return calls


def newer_python():
    """A Python on the PATH that is new enough."""
    check = "import sys; sys.exit(sys.version_info[:2] < (%d, %d))" % NEEDED
    for name in NAMES:
        path = shutil.which(name)
        if path and subprocess.call([path, "-c", check], stderr=subprocess.DEVNULL) == 0:
            return path
    return None


def fingerprint(calls):
    """A hash of what is to be installed, so that a changed setup.py installs again."""
    text = repr(calls)
    if os.path.exists("setup.py"):
        text += open("setup.py").read()
    return hashlib.sha256(text.encode()).hexdigest()


def make(folder):
    """The environment's python; makes the environment where there is none (or one that is broken)."""
    python = os.path.join(folder, "bin", "python")
    if not works(python):
        print("making the environment %s with %s" % (folder, sys.executable), flush=True)
        done = subprocess.run([sys.executable, "-m", "venv", "--clear", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            shutil.rmtree(folder, ignore_errors=True)
            fail(
                "this Python (%s) has no working venv or pip.\n  Debian, Ubuntu: apt-get install python3-venv\n"
                "  others: install the package of your system that has Python's venv and ensurepip\n%s"
                % (sys.executable, done.stdout.decode(errors="replace").strip()[-600:])
            )
    return python


def works(python):
    """Whether there is such a Python and it has pip."""
    if not os.path.exists(python):
        return False
    return subprocess.call([python, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def install(folder, python, arguments):
    """One call of pip, its talk in pip.log, one line of progress on the screen."""
    log_path = os.path.join(folder, "pip.log")
    seen = installed = 0
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"] + arguments
    with open(log_path, "ab") as log:
        log.write(("$ %s\n" % " ".join(command)).encode())
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in process.stdout:
            log.write(line)
            words = line.decode(errors="replace").split()
            first = words[0] if words else ""
            if first in ("Collecting", "Processing"):
                seen += 1
                progress("installing into %s: %d packages found, now %s" % (folder, seen, os.path.basename(words[1])))
            elif first == "Installing":
                progress("installing into %s: writing %d packages" % (folder, seen))
            elif words[:2] == ["Successfully", "installed"]:
                installed = len(words) - 2
    progress("")
    if process.wait() != 0:
        sys.stderr.write(open(log_path, errors="replace").read()[-3000:])
        fail("pip could not install %s (no network? the whole of its output is in %s)" % (" ".join(arguments), log_path))
    if installed:
        print("installed %d packages into %s" % (installed, folder), flush=True)


def progress(text):
    """Shows the text in place on a terminal; elsewhere nothing, so that logs stay short."""
    if sys.stdout.isatty():
        sys.stdout.write("\r\033[K" + text[: shutil.get_terminal_size().columns - 1])
        sys.stdout.flush()


def fail(message):
    """Ends with one message."""
    sys.exit("\n" + message)


if __name__ == "__main__":
    main()
