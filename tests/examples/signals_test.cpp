// What a command does with signals, seen from outside: each case is a process of its own.
#include <doctest/doctest.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <optional>
#include <string>
#include <thread>

#include <linattn/weights/mapped_file.hpp>

#include "nn/signals.hpp"
#include "weights/temporary_folder.hpp"

namespace {

using support::TemporaryFolder;

struct Outcome {
  int status = 0;  // of waitpid
  std::string said;

  [[nodiscard]] int code() const { return WIFEXITED(status) ? WEXITSTATUS(status) : -1; }
  [[nodiscard]] int signal() const { return WIFSIGNALED(status) ? WTERMSIG(status) : 0; }
};

// The process ends with 0 where `body` comes to its end.
template <class Body>
Outcome in_process(const Body& body) {
  std::array<int, 2> ends{};
  REQUIRE(::pipe(ends.data()) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    for (const int signal : {SIGHUP, SIGINT, SIGTERM, SIGBUS, SIGABRT}) std::signal(signal, SIG_DFL);
    ::dup2(ends[1], STDERR_FILENO);
    ::alarm(20);
    body();
    ::_exit(0);
  }
  ::close(ends[1]);
  Outcome outcome;
  std::array<char, 4096> buffer;
  for (ssize_t count; (count = ::read(ends[0], buffer.data(), buffer.size())) > 0;)
    outcome.said.append(buffer.data(), static_cast<std::size_t>(count));
  ::close(ends[0]);
  REQUIRE(::waitpid(child, &outcome.status, 0) == child);
  return outcome;
}

void sleep_milliseconds(int count) { std::this_thread::sleep_for(std::chrono::milliseconds(count)); }

// Pages of a file, all but the first of which it has lost since.
linattn::MappedFile cut_short(const std::filesystem::path& path) {
  support::write_text(path, std::string(1 << 20, 'x'));
  linattn::MappedFile file;
  if (!linattn::MappedFile::open(path, file).ok()) ::_exit(99);
  std::filesystem::resize_file(path, 1);
  return file;
}

char last_byte(const linattn::MappedFile& file) {
  return static_cast<char>(*const_cast<const volatile std::byte*>(&file.bytes().back()));
}

}  // namespace

TEST_CASE("a signal ends a command, at once and by its own status") {
  for (const int signal : {SIGHUP, SIGINT, SIGTERM, SIGQUIT, SIGUSR1})
    CHECK(in_process([&] {
            nn::handle_signals("test");
            std::raise(signal);
          }).signal() == signal);
}

TEST_CASE("a signal waits until nothing is unfinished") {
  const TemporaryFolder folder;
  const Outcome outcome = in_process([&] {
    nn::handle_signals("test");
    const nn::Unfinished outer;
    {
      const nn::Unfinished inner;
      if (nn::stop_requested()) ::_exit(1);
      std::raise(SIGTERM);
      std::raise(SIGHUP);  // of the same terminal that is closed
    }
    if (!nn::stop_requested()) ::_exit(2);
    support::write_text(folder / "cleaned", "");
  });
  CHECK(outcome.signal() == SIGTERM);
  CHECK(folder.names() == std::vector<std::string>{"cleaned"});
}

TEST_CASE("a signal that another thread gets goes to the one that writes") {
  for (const bool writing : {false, true}) {
    const TemporaryFolder folder;
    const Outcome outcome = in_process([&] {
      nn::handle_signals("test");
      std::atomic<bool> sent = false;
      std::thread other;
      {
        std::optional<nn::Unfinished> unfinished;
        if (writing) unfinished.emplace();
        other = std::thread([&] {
          pthread_kill(pthread_self(), SIGINT);
          sent = true;
        });
        while (!sent || !nn::stop_requested()) sleep_milliseconds(1);
        support::write_text(folder / "cleaned", "");
      }
      other.join();
    });
    CHECK(outcome.signal() == SIGINT);
    CHECK(folder.names().size() == (writing ? 1 : 0));
  }
}

TEST_CASE("a signal that comes again after a second does not wait") {
  const TemporaryFolder folder;
  const Outcome outcome = in_process([&] {
    nn::handle_signals("test");
    const nn::Unfinished unfinished;
    std::raise(SIGINT);
    sleep_milliseconds(2100);
    std::raise(SIGTERM);
    support::write_text(folder / "cleaned", "");
  });
  CHECK(outcome.signal() == SIGTERM);
  CHECK(folder.names().empty());
}

TEST_CASE("signals that are ignored stay so, and a write to nobody fails instead of ending") {
  CHECK(in_process([] {
          std::signal(SIGHUP, SIG_IGN);
          nn::handle_signals("test");
          std::raise(SIGHUP);
          std::raise(SIGPIPE);
          std::raise(SIGXFSZ);
        }).code() == 0);
}

TEST_CASE("a shell that ignores INT for its background does not mean a kill") {
  CHECK(in_process([] {
          std::signal(SIGINT, SIG_IGN);
          nn::handle_signals("test");
          std::raise(SIGINT);
        }).signal() == SIGINT);
}

TEST_CASE("a mapped file that is cut short ends in a sentence") {
  const TemporaryFolder folder;
  for (const bool thread : {false, true}) {
    const Outcome outcome = in_process([&] {
      nn::handle_signals("test");
      const linattn::MappedFile file = cut_short(folder / "model.safetensors");
      if (!thread) (void)last_byte(file);
      std::array<std::thread, 4> threads;
      for (std::thread& t : threads) t = std::thread([&] { (void)last_byte(file); });
      for (std::thread& t : threads) t.join();
    });
    CHECK(outcome.code() == 2);
    CHECK(outcome.said == "test: " + (folder / "model.safetensors").string() +
                              ": was cut short while it was read, or its disk failed\n");
  }
}

TEST_CASE("while a file is unfinished, what is cut short reads as zeros until the end") {
  const TemporaryFolder folder;
  const Outcome outcome = in_process([&] {
    nn::handle_signals("test");
    const linattn::MappedFile file = cut_short(folder / "model.safetensors");
    const nn::Unfinished unfinished;
    if (last_byte(file) != 0 || !nn::stop_requested()) ::_exit(1);
    support::write_text(folder / "cleaned", "");
  });
  CHECK(outcome.code() == 2);
  CHECK(outcome.said.find("model.safetensors: was cut short") != std::string::npos);
  CHECK(folder.names().size() == 2);
}

TEST_CASE("any other SIGBUS is as before") {
  CHECK(in_process([] {
          nn::handle_signals("test");
          std::raise(SIGBUS);
          std::raise(SIGBUS);
        }).signal() == SIGBUS);
}
