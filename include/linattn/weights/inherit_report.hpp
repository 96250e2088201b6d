// The report of a plan: every tensor of source and target accounted for, as a table and as JSON.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <linattn/version.hpp>
#include <linattn/weights/inherit_plan.hpp>
#include <linattn/weights/json.hpp>
#include <linattn/weights/safetensors.hpp>

LINATTN_BEGIN

struct Tally {
  std::size_t tensors = 0;
  Index parameters = 0;

  void add(const TensorSpec& spec) {
    ++tensors;
    parameters += spec.elements();
  }
};

// Source = inherited + re-laid out + dropped. Target = inherited + re-laid out + new. The part of a re-laid out
// tensor that is left out counts as dropped, in parameters.
struct Totals {
  Tally source, target, inherited, relaid, created, dropped;
  std::uint64_t target_bytes = 0;
};

// Inherited tensors keep shape and bytes, if not their name; re-laid out ones lose leading positions.
[[nodiscard]] inline std::string_view outcome(const PlanItem& item) {
  if (item.from == Source::create) return "new";
  if (item.from == Source::drop) return "dropped";
  return item.left_out == 0 ? "inherited" : "re-laid out";
}

[[nodiscard]] inline Totals totals(const Plan& plan) {
  Totals sum;
  for (const PlanItem& item : plan.items) {
    const std::string_view what = outcome(item);
    if (what == "inherited") sum.inherited.add(item.target);
    if (what == "re-laid out") sum.relaid.add(item.target);
    if (what == "new") sum.created.add(item.target);
    if (what == "dropped") sum.dropped.add(item.target);
    if (what != "new") sum.source.add(item.target);
    sum.source.parameters += item.left_out;
    sum.dropped.parameters += item.left_out;
    if (what == "dropped") continue;
    sum.target.add(item.target);
    sum.target_bytes += item.target.byte_size();
  }
  return sum;
}

namespace detail {

// What is dropped or re-laid out, a line for each reason.
[[nodiscard]] inline std::string reason_lines(const Plan& plan, std::string_view what) {
  constexpr std::size_t shown = 3;
  std::vector<std::string_view> reasons;  // in the order of the file
  std::map<std::string_view, std::vector<std::string_view>> tensors;
  for (const PlanItem& item : plan.items) {
    if (outcome(item) != what || item.reason.empty()) continue;
    auto& names = tensors[item.reason];
    if (names.empty()) reasons.push_back(item.reason);
    names.push_back(item.source);
  }
  std::string text;
  for (const std::string_view reason : reasons) {
    const auto& names = tensors[reason];
    text += "    ";
    for (std::size_t i = 0; i < std::min(shown, names.size()); ++i)
      text += (i > 0 ? ", " : "") + printable(names[i]);
    if (names.size() > shown) text += " and " + std::to_string(names.size() - shown) + " more";
    text += ": " + std::string(reason) + "\n";
  }
  return text;
}

}  // namespace detail

// The report for people. Percentages are of the target's parameters.
[[nodiscard]] inline std::string report_table(const Plan& plan) {
  const Totals sum = totals(plan);
  std::string text = plan.model.label + ", " + plan.model.layout + " names\n";
  for (const std::string& note : plan.model.notes) text += note + "\n";
  text += "replaced: " + describe(plan.replaced) + " (" + std::to_string(plan.replaced.size()) + " of " +
          std::to_string(plan.model.attentions.size()) + " attentions)\n";
  std::set<std::string> forms;
  for (const auto& [stem, module] : plan.conversion) forms.insert(describe(module));
  for (const std::string& form : forms) text += "by: " + form + "\n";
  text += "\n";
  const auto row = [&](const char* what, const Tally& tally, bool share) {
    std::string digits = std::to_string(tally.parameters);
    for (auto i = static_cast<Index>(digits.size()) - 3; i > 0; i -= 3)
      digits.insert(static_cast<std::size_t>(i), ",");
    std::array<char, 96> line{};
    std::snprintf(line.data(), line.size(), "%-14s %8zu tensors %17s parameters", what, tally.tensors,
                  digits.c_str());
    text += line.data();
    if (share) {
      const double part = sum.target.parameters > 0 ? 100.0 * static_cast<double>(tally.parameters) /
                                                          static_cast<double>(sum.target.parameters)
                                                    : 0.0;
      std::snprintf(line.data(), line.size(), " %7.2f %%", part);
      text += line.data();
    }
    text += "\n";
  };
  row("source", sum.source, false);
  row("  dropped", sum.dropped, false);
  text += detail::reason_lines(plan, "dropped");
  row("target", sum.target, true);
  row("  inherited", sum.inherited, true);
  row("  re-laid out", sum.relaid, true);
  text += detail::reason_lines(plan, "re-laid out");
  row("  new", sum.created, true);
  text += "mismatched     " +
          std::string(8 - std::min<std::size_t>(8, std::to_string(plan.mismatches.size()).size()), ' ') +
          std::to_string(plan.mismatches.size()) + " tensors\n";
  constexpr std::size_t shown = 20;
  for (std::size_t i = 0; i < std::min(shown, plan.mismatches.size()); ++i)
    text += "  " + detail::printable(plan.mismatches[i].tensor) + " " + describe(plan.mismatches[i]) + "\n";
  if (plan.mismatches.size() > shown)
    text += "  and " + std::to_string(plan.mismatches.size() - shown) + " more\n";
  if (!plan.not_needed.empty())
    text += "not needed     " + std::to_string(plan.not_needed.size()) + " tensors of the init file\n";
  if (!plan.files.empty())
    text += "copied         " + std::to_string(plan.files.size()) + " other files of the folder\n";
  for (const auto& path : plan.left_out)
    text += "left out       " + path.string() + ", which holds unconverted weights\n";
  for (const auto& path : plan.stale)
    text += "left out       " + path.string() + ": index and shards do not belong together\n";
  return text;
}

// The report for machines: every tensor of source and target, with what becomes of it.
[[nodiscard]] inline nlohmann::ordered_json report_json(const Plan& plan) {
  using Json = nlohmann::ordered_json;
  const Totals sum = totals(plan);
  const auto tally = [&](const Tally& of) {
    return Json{{"tensors", of.tensors},
                {"parameters", of.parameters},
                {"percent_of_target",
                 sum.target.parameters > 0
                     ? 100.0 * static_cast<double>(of.parameters) / static_cast<double>(sum.target.parameters)
                     : 0.0}};
  };
  Json tensors = Json::array(), mismatches = Json::array(), files = Json::array(), left_out = Json::array();
  for (const PlanItem& item : plan.items) {
    Json entry{{"name", item.target.name},
               {"outcome", outcome(item)},
               {"dtype", name(item.target.dtype)},
               {"shape", item.target.shape},
               {"parameters", item.target.elements()}};
    if (!item.source.empty()) entry["source"] = item.source;
    if (item.initialiser != Initialiser::none) entry["initialiser"] = name(item.initialiser);
    if (item.initialiser == Initialiser::normal || item.initialiser == Initialiser::uniform)
      entry["seed"] = item.seed;
    if (item.left_out > 0) entry["left_out_parameters"] = item.left_out;
    if (!item.reason.empty()) entry["reason"] = item.reason;
    tensors.push_back(std::move(entry));
  }
  for (const Mismatch& mismatch : plan.mismatches) {
    mismatches.push_back(
        {{"name", mismatch.tensor}, {"expected", mismatch.expected}, {"actual", mismatch.actual}});
    if (!mismatch.note.empty()) mismatches.back()["note"] = mismatch.note;
  }
  for (const auto& path : plan.files) files.push_back(path.string());
  for (const auto* paths : {&plan.left_out, &plan.stale})
    for (const auto& path : *paths) left_out.push_back(path.string());
  return {{"family", plan.model.label},
          {"layout", plan.model.layout},
          {"notes", plan.model.notes},
          {"replaced", describe(plan.replaced)},
          {"attentions", {{"replaced", plan.replaced.size()}, {"all", plan.model.attentions.size()}}},
          {"linattn", conversion_json<Json>(plan.conversion, plan.stated_heads())},
          {"source", tally(sum.source)},
          {"target", tally(sum.target)},
          {"inherited", tally(sum.inherited)},
          {"re_laid_out", tally(sum.relaid)},
          {"new", tally(sum.created)},
          {"dropped", tally(sum.dropped)},
          {"mismatched", std::move(mismatches)},
          {"not_needed", plan.not_needed},
          {"tensors", std::move(tensors)},
          {"files_copied", std::move(files)},
          {"files_left_out", std::move(left_out)}};
}

LINATTN_END
