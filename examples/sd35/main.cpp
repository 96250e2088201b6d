// linattn-sd35: a prompt to a picture with Stable Diffusion 3.5.
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "nn/command.hpp"
#include "nn/finite.hpp"
#include "nn/options.hpp"
#include "nn/outputs.hpp"
#include "nn/progress.hpp"
#include "nn/standard_output.hpp"
#include "nn/text.hpp"
#include "nn/threads.hpp"
#include "pipeline.hpp"
#include "prompt_file.hpp"

namespace {

constexpr const char* examples = R"(Examples:
  a diffusers folder
    linattn-sd35 -m stable-diffusion-3.5-medium -p "a lighthouse at night" -o lighthouse.png
  single files, with the tokenizer folders of the diffusers repository
    linattn-sd35 -m sd3.5_large.safetensors --clip-l clip_l.safetensors --clip-g clip_g.safetensors \
      --t5xxl t5xxl_fp16.safetensors --tokenizers stable-diffusion-3.5-large -W 1024 -H 768 -p "..."
  a checkpoint that linattn-inherit wrote: its linear attention runs by itself
    linattn-sd35 -m medium-t5 -p "..." --steps 28 --cfg-scale 4.5 --seed 7 --json
  another picture to start from; four pictures; a picture for each line of a file
    linattn-sd35 -m medium -p "a lighthouse in winter" -i lighthouse.jpg --strength 0.6
    linattn-sd35 -m medium -p "a lighthouse" -b 4 -o lighthouse_%02d.png
    linattn-sd35 -m medium --prompt-file prompts.txt -o picture.png
Exit code: 0 when the pictures are written, 2 after an error, which stderr states in one sentence.)";

struct Arguments {
  sd35::ModelFiles files;
  sd35::PictureOptions picture;
  std::filesystem::path output = "output.png", prompt_file;
  std::string method = "euler", scheduler = "sd3";
  std::optional<std::uint64_t> seed = 42;  // unset: a random one
  int threads = 0, batch_count = 1;
  bool verbose = false, json = false;
};

void add_options(CLI::App& app, Arguments& a) {
  const char* const model = "Model";
  nn::add_path(app, "-m,--model", a.files.model, "diffusers folder, or full safetensors file")->group(model);
  nn::add_path(app, "--diffusion-model", a.files.transformer, "the transformer alone, instead of that in -m")
      ->group(model);
  nn::add_path(app, "--vae", a.files.vae, "the VAE, instead of that in -m")->group(model);
  nn::add_path(app, "--clip-l,--clip_l", a.files.clip_l, "the CLIP-L encoder, instead of that in -m")
      ->group(model);
  nn::add_path(app, "--clip-g,--clip_g", a.files.clip_g, "the CLIP-G encoder, instead of that in -m")
      ->group(model);
  nn::add_path(app, "--t5xxl", a.files.t5, "the T5-XXL encoder, instead of that in -m")->group(model);
  nn::add_path(app, "--tokenizers", a.files.tokenizers,
               "folder with tokenizer/, tokenizer_2/ and tokenizer_3/ (default: the folder -m)")
      ->group(model);
  app.add_flag("--turbo", a.picture.turbo, "the model is Large Turbo, which has the shapes of Large")
      ->group(model);

  const char* const picture = "Picture";
  CLI::App* const source = app.add_option_group("prompts")->require_option(1);
  nn::add_text(*source, "-p,--prompt", a.picture.prompt, "what to draw")->group(picture);
  nn::add_path(*source, "--prompt-file", a.prompt_file, "a picture for each line; # begins a comment")
      ->group(picture);
  nn::add_text(app, "-n,--negative-prompt", a.picture.negative_prompt, "what to stay away from")
      ->group(picture);
  for (const auto& [names, side] :
       {std::pair("-W,--width", &a.picture.width), std::pair("-H,--height", &a.picture.height)})
    nn::add_number(app, names, *side, nn::side_range, "in pixels (default: 1024, or what the model can)")
        ->group(picture);
  app.add_flag(
         "--official", a.picture.official,
         "text and colours as the official code: 77 or more T5 tokens, CLIP word by word, rounding down")
      ->group(picture);
  nn::add_value(
      app, "-s,--seed", describe(nn::seed_range) + ", or -1 for a random one",
      [&a](const std::string& text) {
        a.seed = nn::parse_number(text, nn::seed_range);
        return a.seed || text == "-1";
      },
      "of the noise, that of torch on the CPU; -1: a random one")
      ->type_name(short_text(nn::seed_range))
      ->default_str(nn::number_text(*a.seed))
      ->group(picture);
  nn::add_number(app, "-b,--batch-count", a.batch_count, {1, 100000},
                 "pictures a prompt, with the seeds that follow")
      ->group(picture);
  nn::add_path(app, "-o,--output", a.output,
               "PNG file to write; of several pictures, %d or %03d in it is their number from 0")
      ->group(picture);
  nn::add_path(app, "-i,--init-img", a.picture.init_image,
               "PNG or JPEG to start from: scaled to cover -W x -H and cut, or in its own size without them")
      ->group(picture);
  nn::add_number(app, "--strength", a.picture.strength, {0.001, 1},
                 "of the change to --init-img: the part of the steps")
      ->group(picture);

  const char* const sampling = "Sampling";
  nn::add_number(app, "--steps", a.picture.steps, {1, sd35::max_steps},
                 "default: 40 (Medium), 28 (Large), 4 (Turbo)")
      ->group(sampling);
  nn::add_number(app, "--cfg-scale", a.picture.cfg_scale, nn::guidance_range,
                 "guidance; 1 or less is none (default: 4.5 Medium, 3.5 Large, 1 Turbo)")
      ->group(sampling);
  nn::add_text(app, "--sampler,--sampling-method", a.method, "euler, or dpm++2m (also called dpmpp_2m)")
      ->group(sampling);
  nn::add_text(app, "--scheduler", a.scheduler, "sd3 (official), or discrete (stable-diffusion.cpp)")
      ->group(sampling);
  nn::add_number(app, "--flow-shift", a.picture.flow_shift, {0.001, 1000}, "of the noise levels")
      ->group(sampling);
  sd35::SkipLayerGuidance& slg = a.picture.skip_layers;
  nn::add_number(app, "--slg-scale", slg.scale, nn::guidance_range,
                 "skip-layer guidance (2.5 is usual with Medium); 0 is none")
      ->group(sampling);
  nn::add_number(app, "--skip-layers", slg.layers, {0, 9999}, "the blocks that it skips")->group(sampling);
  nn::add_number(app, "--skip-layer-start", slg.start, {0, 1}, "fraction of the steps where it starts")
      ->group(sampling);
  nn::add_number(app, "--skip-layer-end", slg.end, {0, 1}, "fraction of the steps where it ends")
      ->group(sampling);

  app.final_callback([&slg] {
    if (slg.start > slg.end)
      throw CLI::ValidationError("--skip-layer-start: " + nn::number_text(slg.start) +
                                 " is behind --skip-layer-end, which is " + nn::number_text(slg.end));
  });

  const char* const run = "Run";
  nn::add_number(app, "-t,--threads", a.threads, nn::thread_range,
                 "0: all cores; the picture is the same with any number")
      ->group(run);
  app.add_flag(
         "--vae-tiling", a.picture.vae_tiling,
         "decode in bands of rows: less memory, more time, the same picture; beyond 1024 x 1024 by itself")
      ->group(run);
  app.add_flag("-v,--verbose", a.verbose, "print the times of all stages")->group(run);
  app.add_flag("--json", a.json, "print the result as JSON on stdout, of several pictures a line each")
      ->group(run);
  app.footer(examples);
}

nlohmann::ordered_json report(const sd35::Picture& picture, const std::filesystem::path& output,
                              sd35::Index threads) {
  const sd35::PictureOptions& options = picture.options;
  nlohmann::ordered_json json{{"output", output.string()},
                              {"model", picture.model},
                              {"attention_modules", picture.modules},
                              {"linear_attention_modules", picture.converted_modules},
                              {"prompt", options.prompt},
                              {"negative_prompt", options.negative_prompt},
                              {"width", *options.width},
                              {"height", *options.height},
                              {"seed", options.seed},
                              {"steps", *options.steps},
                              {"cfg_scale", *options.cfg_scale},
                              {"sampling_method", name(options.method)},
                              {"scheduler", name(options.scheduler)},
                              {"flow_shift", options.flow_shift},
                              {"official", options.official},
                              {"slg_scale", options.skip_layers.scale},
                              {"threads", threads}};
  if (!options.init_image.empty()) {
    json["init_image"] = options.init_image.string();
    json["strength"] = options.strength;
  }
  json["ignored_tensors"] = sd35::to_json(picture.ignored);
  json["seconds"] = nlohmann::ordered_json::object();
  double total = 0;
  for (const sd35::Stage& stage : picture.stages) {
    json["seconds"][stage.name] = stage.seconds;
    total += stage.seconds;
  }
  json["seconds"]["total"] = total;
  json["seconds"]["a_step"] = picture.seconds_a_step;
  return json;
}

// Every prompt with every seed.
std::vector<sd35::Subject> subjects_of(const Arguments& a, const std::vector<std::string>& prompts) {
  const std::uint64_t seed = a.seed ? *a.seed : std::random_device()();
  if (const auto more = static_cast<std::uint64_t>(a.batch_count - 1); seed > nn::seed_range.most - more)
    throw std::runtime_error("--seed: " + std::to_string(seed) + " has no " + std::to_string(more) +
                             " seeds behind it for --batch-count, the last is " +
                             std::to_string(nn::seed_range.most));
  std::vector<sd35::Subject> subjects;
  for (const std::string& prompt : prompts)
    for (int i = 0; i < a.batch_count; ++i)
      subjects.push_back({prompt, seed + static_cast<std::uint64_t>(i)});
  return subjects;
}

linattn::FileSet inputs_of(const Arguments& a) {
  linattn::FileSet inputs;
  const sd35::ModelFiles& files = a.files;
  for (const auto* model :
       {&files.model, &files.transformer, &files.vae, &files.clip_l, &files.clip_g, &files.t5})
    nn::add_model(inputs, *model);
  for (const auto* other : {&files.tokenizers, &a.prompt_file, &a.picture.init_image}) inputs.add(*other);
  return inputs;
}

int run(Arguments& a) {
  a.picture.method = sd35::parse_method(a.method);
  a.picture.scheduler = sd35::parse_scheduler(a.scheduler);
  if (a.files.model.empty() && (a.files.transformer.empty() || a.files.vae.empty()))
    throw std::runtime_error("--model is required, or --diffusion-model and --vae");
  const std::vector<std::string> prompts =
      a.prompt_file.empty() ? std::vector<std::string>{a.picture.prompt} : sd35::read_prompts(a.prompt_file);
  const std::vector<sd35::Subject> subjects = subjects_of(a, prompts);
  const std::size_t count = subjects.size();
  if (nn::is_stream(a.output) && count > 1)
    throw std::runtime_error(a.output.string() + ": takes one picture, not " + std::to_string(count));
  nn::Outputs outputs(inputs_of(a));
  for (std::size_t i = 0; i < count; ++i) outputs.add_file(sd35::output_path(a.output, i, count));

  nn::expect_threads(a.threads);
  sd35::Runtime rt(a.threads);
  sd35::ProgressBar bar;
  sd35::Progress progress;
  progress.on_stage = [&](std::string_view stage) {
    std::fprintf(stderr, "%.*s\n", static_cast<int>(stage.size()), stage.data());
  };
  progress.on_encoder = [](std::string_view encoder) {
    std::fprintf(stderr, "  %.*s\n", static_cast<int>(encoder.size()), encoder.data());
  };
  progress.on_note = [](std::string_view note) {
    std::fprintf(stderr, "note: %s\n", nn::printable(note).c_str());
  };
  progress.on_step = [&](int step, int steps) {
    if (step == 0) bar.begin();
    bar.show(step, steps);
  };
  std::size_t index = 0;
  progress.on_picture = [&](std::size_t picture, std::size_t pictures) {
    index = picture;
    if (pictures > 1)
      std::fprintf(stderr, "picture %zu of %zu, seed %llu: %s\n", picture + 1, pictures,
                   static_cast<unsigned long long>(subjects[picture].seed),
                   nn::printable(subjects[picture].prompt).c_str());
  };
  make_pictures(rt, a.files, a.picture, subjects, progress, [&](const sd35::Picture& picture) {
    const std::filesystem::path output = sd35::output_path(a.output, index, count);
    const nlohmann::ordered_json facts = report(picture, output, rt.workers());
    sd35::expect_finite_report(facts);
    outputs.write(output, nn::encode_png(picture.image,
                                         {{"parameters", picture.parameters()}, {"Software", "linattn"}}));
    if (a.verbose) {
      std::fprintf(stderr, "%s, %td of %td attentions linear, %td threads\n", picture.model.c_str(),
                   picture.converted_modules, picture.modules, rt.workers());
      for (const sd35::Stage& stage : picture.stages)
        std::fprintf(stderr, "  %-10s %8.3f s\n", stage.name.c_str(), stage.seconds);
    }
    if (a.json)
      nn::print_text(facts.dump(count > 1 ? -1 : 2, ' ', false, nlohmann::json::error_handler_t::replace) +
                     "\n");
    else
      outputs.print_text(output.string() + "\n");
  });
  return 0;
}

}  // namespace

int main(int count, char** values) {
  CLI::App app("Draws a picture from a prompt with Stable Diffusion 3.5, softmax or linear attention.",
               "linattn-sd35");
  Arguments arguments;
  add_options(app, arguments);
  return nn::run_command(app, count, values, [&] { return run(arguments); });
}
