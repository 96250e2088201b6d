// stop_at count COMMAND...          the calls to the system that change files: "NUMBER NAME" a line, on stdout
// stop_at N SIGNAL COMMAND...       before call N the command gets this signal; KILL ends it there
// stop_at N ERRNO COMMAND...        call N is not made, and fails with this error: ENOSPC, EIO, ...
// Numbers begin at 1. Ends as the command does: with its exit code, or 128 + the signal that ended it. Exit code 77:
// this system lets no process trace another.
//
// A filter stops the command at the calls named below alone, whatever library makes them, in any thread.
#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>
#include <string_view>

#if !defined(__x86_64__) || !defined(__linux__)
int main() { return 77; }
#else
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

namespace {

struct Call {
  unsigned number;
  const char* name;
};
// Opens are looked at by their flags, writes by their descriptor.
constexpr Call opens[] = {{SYS_open, "open"}, {SYS_openat, "openat"}};
constexpr Call writes[] = {{SYS_write, "write"}, {SYS_pwrite64, "pwrite"}, {SYS_writev, "writev"}};
constexpr Call others[] = {{SYS_creat, "creat"},
                           {SYS_rename, "rename"},
                           {SYS_renameat, "renameat"},
                           {SYS_renameat2, "renameat2"},
                           {SYS_unlink, "unlink"},
                           {SYS_unlinkat, "unlinkat"},
                           {SYS_rmdir, "rmdir"},
                           {SYS_mkdir, "mkdir"},
                           {SYS_mkdirat, "mkdirat"},
                           {SYS_link, "link"},
                           {SYS_linkat, "linkat"},
                           {SYS_symlink, "symlink"},
                           {SYS_symlinkat, "symlinkat"},
                           {SYS_truncate, "truncate"},
                           {SYS_ftruncate, "ftruncate"},
                           {SYS_fallocate, "fallocate"},
                           {SYS_fsync, "fsync"},
                           {SYS_fdatasync, "fdatasync"},
                           {SYS_copy_file_range, "copy_file_range"},
                           {SYS_sendfile, "sendfile"},
                           {SYS_chmod, "chmod"},
                           {SYS_fchmod, "fchmod"},
                           {SYS_fchmodat, "fchmodat"},
                           {SYS_utimensat, "utimensat"}};

struct Named {
  const char* name;
  int value;
};
constexpr Named signals[] = {{"KILL", SIGKILL}, {"INT", SIGINT},   {"TERM", SIGTERM},
                             {"HUP", SIGHUP},   {"QUIT", SIGQUIT}, {"XFSZ", SIGXFSZ}};
constexpr Named errors[] = {
    {"ENOSPC", ENOSPC}, {"EIO", EIO}, {"EDQUOT", EDQUOT}, {"EFBIG", EFBIG}, {"EROFS", EROFS}};

constexpr std::size_t argument(int index) {
  return offsetof(seccomp_data, args) + 8 * static_cast<std::size_t>(index);  // the low half
}

// Asks the tracer at the calls above. Every test of the filter jumps over the instructions that are its own.
bool install_filter() {
  std::array<sock_filter, 256> code{};
  std::size_t size = 0;
  const auto add = [&](sock_filter instruction) { code[size++] = instruction; };
  const auto load = [&](std::size_t offset) {
    add(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, static_cast<unsigned>(offset)));
  };
  const auto answer = [&](unsigned action) { add(BPF_STMT(BPF_RET | BPF_K, action)); };

  load(offsetof(seccomp_data, nr));
  for (const Call& call : others) {
    add(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call.number, 0, 1));
    answer(SECCOMP_RET_TRACE);
  }
  for (const Call& call : opens) {
    add(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call.number, 0, 4));
    load(argument(call.number == SYS_open ? 1 : 2));
    add(BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, O_WRONLY | O_RDWR | O_CREAT, 0, 1));
    answer(SECCOMP_RET_TRACE);
    answer(SECCOMP_RET_ALLOW);
  }
  for (const Call& call : writes) {  // but what is printed
    add(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call.number, 0, 4));
    load(argument(0));
    add(BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, STDERR_FILENO, 0, 1));
    answer(SECCOMP_RET_TRACE);
    answer(SECCOMP_RET_ALLOW);
  }
  answer(SECCOMP_RET_ALLOW);

  const sock_fprog program{static_cast<unsigned short>(size), code.data()};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

const char* name_of(unsigned long number) {
  for (const Call& call : opens)
    if (call.number == number) return call.name;
  for (const Call& call : writes)
    if (call.number == number) return call.name;
  for (const Call& call : others)
    if (call.number == number) return call.name;
  return "?";
}

int value_of(std::string_view name) {
  for (const Named& signal : signals)
    if (name == signal.name) return signal.value;
  for (const Named& error : errors)
    if (name == error.name) return -error.value;
  return 0;
}

// The call that the thread waits in is not made, and returns -error.
bool fail_call(pid_t thread, int error) {
  user_regs_struct registers{};
  if (::ptrace(PTRACE_GETREGS, thread, nullptr, &registers) != 0) return false;
  registers.orig_rax = static_cast<unsigned long long>(-1);
  registers.rax = static_cast<unsigned long long>(-static_cast<long long>(error));
  return ::ptrace(PTRACE_SETREGS, thread, nullptr, &registers) == 0;
}

int fail(const char* what) {
  std::fprintf(stderr, "stop_at: %s: %s\n", what, std::strerror(errno));
  return 77;
}

}  // namespace

int main(int count, char** values) {
  const bool counting = count > 2 && std::string_view(values[1]) == "count";
  const int first = counting ? 2 : 3;
  const int action = counting || count < 3 ? 0 : value_of(values[2]);
  if (count <= first || (!counting && action == 0)) {
    std::fprintf(stderr, "usage: stop_at count COMMAND... | stop_at N SIGNAL|ERRNO COMMAND...\n");
    return 64;
  }
  const long target = counting ? 0 : std::strtol(values[1], nullptr, 10);

  const pid_t child = ::fork();
  if (child < 0) return fail("fork");
  if (child == 0) {
    if (::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) ::_exit(77);
    ::raise(SIGSTOP);  // until the tracer has set its options
    if (!install_filter()) ::_exit(77);
    ::execvp(values[first], values + first);
    ::_exit(77);
  }

  int status = 0;
  if (::waitpid(child, &status, 0) != child || !WIFSTOPPED(status))
    return fail("this system lets nobody trace");
  const long options = PTRACE_O_EXITKILL | PTRACE_O_TRACESECCOMP | PTRACE_O_TRACECLONE | PTRACE_O_TRACEFORK |
                       PTRACE_O_TRACEVFORK | PTRACE_O_TRACEEXEC;
  if (::ptrace(PTRACE_SETOPTIONS, child, nullptr, options) != 0) return fail("ptrace");
  ::ptrace(PTRACE_CONT, child, nullptr, nullptr);

  long calls = 0;
  for (;;) {
    const pid_t thread = ::waitpid(-1, &status, __WALL);
    if (thread < 0) return fail("waitpid");
    if (thread == child && WIFEXITED(status)) return WEXITSTATUS(status);
    if (thread == child && WIFSIGNALED(status)) return 128 + WTERMSIG(status);
    if (!WIFSTOPPED(status)) continue;  // another thread's end
    const int event = status >> 16;
    long deliver = 0;
    if (event == PTRACE_EVENT_SECCOMP) {
      ++calls;
      if (counting) {
        user_regs_struct registers{};
        ::ptrace(PTRACE_GETREGS, thread, nullptr, &registers);
        std::printf("%ld %s\n", calls, name_of(registers.orig_rax));
      } else if (calls == target && action < 0) {
        if (!fail_call(thread, -action)) return fail("ptrace");
      } else if (calls == target) {
        ::kill(child, action);
      }
    } else if (event == 0 && WSTOPSIG(status) != SIGSTOP) {
      deliver = WSTOPSIG(status);
    }
    ::ptrace(PTRACE_CONT, thread, nullptr, deliver);
  }
}
#endif
