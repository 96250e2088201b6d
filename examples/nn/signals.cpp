#include "signals.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <climits>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <span>

namespace nn {
namespace {

// Handlers touch nothing but these and the system.
static_assert(std::atomic<int>::is_always_lock_free && std::atomic<bool>::is_always_lock_free);
pthread_t writer;                  // the thread that Unfinished lives in
std::atomic<int> unfinished = 0;   // how many of them
std::atomic<int> waiting = 0;      // the signal that waits, or 0
std::time_t waiting_since = 0;     // on the monotonic clock; the writer's alone
std::atomic<bool> ending = false;  // whether `sentence` is taken
std::atomic<bool> page_lost = false;
struct sigaction bus_before;
std::array<char, 64> command_name;
std::array<char, PATH_MAX + 256> sentence;
std::size_t sentence_size = 0;

std::time_t seconds() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec;
}

void end_by(int signal) {
  std::signal(signal, SIG_DFL);
  std::raise(signal);  // in its own handler: as soon as that returns
}

void on_end(int signal) {
  const int error = errno;
  if (pthread_equal(pthread_self(), writer) == 0)
    ::pthread_kill(writer, signal);  // only there it is certain that no file is begun just now
  else if (unfinished == 0 || (waiting != 0 && seconds() > waiting_since + 1))
    end_by(signal);
  else if (waiting == 0) {
    waiting_since = seconds();
    waiting = signal;
  }
  errno = error;
}

void append(std::string_view text) {
  for (const char c : text.substr(0, sentence.size() - sentence_size))
    sentence[sentence_size++] = static_cast<unsigned char>(c) < 0x20 && c != '\n' ? '?' : c;
}

[[noreturn]] void end_with_sentence() {
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, sentence.data(), sentence_size);
  ::_exit(2);
}

struct Mapping {
  std::uintptr_t end = 0;
  std::string_view path;  // empty: not found
};

// A line of /proc/self/maps: "7f00-7f10 r--p 00000000 08:01 42    /path".
Mapping parse_mapping(std::string_view line, std::uintptr_t address) {
  std::uintptr_t begin = 0, end = 0;
  const char* const last = line.data() + line.size();
  const auto [dash, error] = std::from_chars(line.data(), last, begin, 16);
  if (error != std::errc{} || dash == last || std::from_chars(dash + 1, last, end, 16).ec != std::errc{})
    return {};
  const std::size_t path = line.find('/');
  if (address < begin || address >= end || path == std::string_view::npos) return {};
  return {end, line.substr(path)};
}

// The file that is mapped at an address, as far as the system tells. The path lies in `buffer`.
Mapping find_mapping(std::uintptr_t address, std::span<char> buffer) {
  const int file = ::open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  Mapping found;
  std::size_t size = 0;
  while (file >= 0 && found.path.empty()) {
    const ssize_t count = ::read(file, buffer.data() + size, buffer.size() - size);
    if (count <= 0) break;
    size += static_cast<std::size_t>(count);
    std::string_view text(buffer.data(), size);
    for (std::size_t end; found.path.empty() && (end = text.find('\n')) != std::string_view::npos;
         text.remove_prefix(end + 1))
      found = parse_mapping(text.substr(0, end), address);
    if (found.path.empty()) {
      std::memmove(buffer.data(), text.data(), text.size());
      size = text.size();
    }
  }
  if (file >= 0) ::close(file);
  return found;
}

void on_bus(int, siginfo_t* info, void*) {
  const int error = errno;
  const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
  std::array<char, PATH_MAX + 256> buffer;
  const Mapping mapping = info->si_code == BUS_ADRERR ? find_mapping(address, buffer) : Mapping{};
  if (mapping.path.empty()) {
    ::sigaction(SIGBUS, &bus_before, nullptr);  // and the access is tried again
    return;
  }
  if (!ending.exchange(true)) {
    append({command_name.data(), std::strlen(command_name.data())});
    append(": ");
    append(mapping.path);
    append(": was cut short while it was read, or its disk failed\n");
    page_lost = true;
    if (unfinished == 0) end_with_sentence();
  } else if (unfinished == 0) {
    while (true) ::pause();  // another thread is about to end the command
  }
  // Zeros take the place of the rest of the file, so that the work gets as far as stop_requested().
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = address / page * page;
  if (::mmap(reinterpret_cast<void*>(begin), mapping.end - begin, PROT_READ,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED)
    ::sigaction(SIGBUS, &bus_before, nullptr);
  errno = error;
}

// Installs a handler where the signal still has its default action. A shell ignores INT for what a script runs in the
// background, but `kill -INT` means it.
void handle_default(int signal, void (*handler)(int)) {
  struct sigaction action {};
  if (::sigaction(signal, nullptr, &action) != 0) return;
  if (action.sa_handler != SIG_DFL && !(signal == SIGINT && action.sa_handler == SIG_IGN)) return;
  action.sa_handler = handler;
  ::sigemptyset(&action.sa_mask);
  action.sa_flags = 0;  // no SA_RESTART: whoever waits for a pipe is woken
  ::sigaction(signal, &action, nullptr);
}

}  // namespace

void handle_signals(std::string_view command) {
  command.copy(command_name.data(), command_name.size() - 1);
  writer = pthread_self();
  for (const int signal : {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGALRM, SIGXCPU})
    handle_default(signal, on_end);
  for (const int signal : {SIGPIPE, SIGXFSZ}) handle_default(signal, SIG_IGN);
  struct sigaction action {};
  action.sa_sigaction = on_bus;
  ::sigemptyset(&action.sa_mask);
  action.sa_flags = SA_SIGINFO;
  ::sigaction(SIGBUS, &action, &bus_before);
}

Unfinished::Unfinished() noexcept { ++unfinished; }

Unfinished::~Unfinished() {
  if (--unfinished > 0) return;
  if (waiting != 0) end_by(waiting);
  if (page_lost) end_with_sentence();
}

bool stop_requested() noexcept { return waiting != 0 || page_lost; }

}  // namespace nn
