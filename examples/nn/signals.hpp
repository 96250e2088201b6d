// What the commands do with signals, and with a file that is cut short while it is mapped. POSIX.
#pragma once

#include <string_view>

namespace nn {

/// For the start of a command, called by the thread that will write its files; `command` begins its sentences.
/// - A signal that ends programs (HUP, INT, QUIT, TERM, ...) still does, and the exit status is that of the signal; but
///   not before what is unfinished on the disk is gone or whole: see Unfinished.
/// - PIPE and XFSZ are ignored: the write fails, and whoever wrote says so.
/// - A page of a mapped file that cannot be read (SIGBUS) ends the command with exit code 2 and a sentence that names the
///   file. Any other SIGBUS is as before.
/// A signal that is ignored (nohup) or handled already stays so, but for an ignored INT.
void handle_signals(std::string_view command);

/// Outlives what is unfinished on the disk, in the thread that writes it. Meanwhile a signal, or a page that is gone,
/// waits; ~Unfinished ends the command by it. The same or another signal a second later does not wait.
class Unfinished {
 public:
  Unfinished() noexcept;
  ~Unfinished();
  Unfinished(const Unfinished&) = delete;
  Unfinished& operator=(const Unfinished&) = delete;
};

/// Whether something waits for the end of an Unfinished, so that long work should be given up. Where a page is gone it
/// must be: its bytes read as 0.
[[nodiscard]] bool stop_requested() noexcept;

}  // namespace nn
